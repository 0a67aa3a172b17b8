"""Replay: a dead task runs again, as a new task."""

from __future__ import annotations

from inferno.protocol.tasks import TaskState
from tasks.intake.submit import Accepted, Submitter
from tasks.state.dead import DeadLetter, DeadLetters
from tasks.state.records import Record
from tasks.state.transitions import Idempotency


class Replay:
    """Turns dead letters into new tasks."""

    def __init__(self, submitter: Submitter, dead: DeadLetters) -> None:
        """Store what takes the new tasks, and where the letters are."""
        self._submitter = submitter
        self._dead = dead

    def replay(self, letter: DeadLetter) -> Accepted:
        """Submit a dead task again as a new task, then discard its letter.

        Raises:
          PayloadGone: its inputs have been deleted.
          BrokerUnavailable: Redis does not answer.
        """
        record = Record(
            letter.task_id, letter.model, letter.version, TaskState.FAILED, letter.accepted_at,
            priority=letter.priority,
        )  # fmt: skip
        # Two clients that replay the same letter at once make one task.
        once = Idempotency(f"replay:{letter.task_id}", letter.task_id)
        accepted = self._submitter.repeat(record, letter.payload, once)
        self._dead.delete([letter.task_id])
        return accepted
