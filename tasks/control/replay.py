"""Replay and retry: a finished task is submitted again, as a new task with an id of its own."""

from __future__ import annotations

from typing import cast

import redis
from kombu.utils.json import loads

from inferno import names
from inferno.errors import PayloadGone, TaskNotFound, WrongState
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.intake.submit import Accepted, Submitter
from tasks.state.dead import DeadLetter, DeadLetters
from tasks.state.records import Record, Records
from tasks.state.transitions import Idempotency


class Replay:
    """Submits finished tasks again."""

    def __init__(self, submitter: Submitter, client: redis.Redis, settings: Settings) -> None:
        """Store where tasks come from and go to.

        Args:
          submitter: accepts the new tasks.
          client: Redis that holds records, payloads and dead letters.
          settings: key prefix and lifetimes.
        """
        self._submitter = submitter
        self._redis = client
        self._prefix = settings.redis.prefix
        self._records = Records(client, settings)
        self._dead = DeadLetters(client, settings)

    def retry(self, task_id: str) -> Accepted:
        """Submit a finished task again, as a new task.

        Raises:
          TaskNotFound: no task has this id.
          WrongState: the task is not over.
          PayloadGone: the task's inputs were not kept; see `INFERNO_TASKS__KEEP_PAYLOADS`.
          BrokerUnavailable: Redis does not answer.
        """
        (record,) = self._records.records([task_id])
        if record is None:
            raise TaskNotFound(f"no task has the id {task_id!r}")
        if not record.state.terminal:
            raise WrongState(f"the task is {record.state}; only a finished task can be retried")
        with translated():
            payload = self._redis.get(names.payload_key(self._prefix, task_id)) or self._redis.hget(
                names.dead_key(self._prefix, task_id), "payload"
            )
        if payload is None:
            raise PayloadGone(
                "the task's inputs were deleted when it ended; "
                "INFERNO_TASKS__KEEP_PAYLOADS=failed keeps the inputs of tasks that did not succeed"
            )
        return self._submitter.repeat(record, loads(cast(bytes, payload)))

    def replay(self, letter: DeadLetter) -> Accepted:
        """Submit a dead task again, as a new task, then discard its letter.

        Raises:
          PayloadGone: the task's inputs have been deleted.
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
