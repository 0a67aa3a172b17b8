"""Forward and settle steps of one batch, in a thread of the worker's pool.

    begin (mark members as running) -> forward pass, in its turn -> settle

A batch occupies an executor for its forward pass only, so Redis' time is not the model's: the batch
before it is settled, and the batch after it begins, meanwhile.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from celery.platforms import EX_FAILURE
from celery.worker import state as worker_state

from inferno.batching.former import FlushReason
from inferno.batching.pace import Pace
from inferno.engine.cores import Cores
from inferno.engine.engine import Engine
from inferno.errors import InfernoError, NotLoaded, PackageError
from tasks.state.transitions import Begun, Verdict
from workers.batches.forward import (
    Answer,
    EnsembleEngine,
    Watch,
    answer,
    prepare,
    unanswered,
)
from workers.batches.member import Batch, Member
from workers.batches.settle import Settler
from workers.batches.settlement import Settled
from workers.batches.turns import Turns

logger = logging.getLogger(__name__)


def threads(executors: int) -> int:
    """Return the number of batches in progress at once.

    Each executor has one batch in its forward pass and one that is settled; one more begins.
    """
    return 2 * executors + 1


def new_batch(reason: FlushReason, members: list[Member]) -> Batch:
    """Return a batch with an id of its own."""
    return Batch(uuid.uuid4().hex, reason, members)


class Execution:
    """Runs the batches of one model; several threads call `run` at the same time."""

    def __init__(
        self,
        name: str,
        engine: Callable[[int], Engine | EnsembleEngine],
        settler: Settler,
        turns: Turns,
        *,
        watch: Watch,
        cores: Cores,
        pace: Pace,
    ) -> None:
        """Store what batches need.

        Args:
          name: name of the Celery task, for the log.
          engine: returns the loaded engine of a version; the first call may take long.
          settler: writes outcomes.
          turns: order of the forward passes.
          watch: guards against a model that hangs.
          cores: cores that passes run on.
          pace: measures the model's speed.
        """
        self._name = name
        self._engine = engine
        self._settler = settler
        self._turns = turns
        self._watch = watch
        self._cores = cores
        self._pace = pace
        #: Time of the last pass, in seconds; infinite before the first, which may be long.
        self.pass_s = math.inf

    def run(self, batch: Batch, passed: Callable[[], None]) -> list[Settled]:
        """Answer and settle a batch that has joined the turns.

        Args:
          batch: what to run.
          passed: called once, when the batch has left its executor.
        Returns:
          The settled members. Empty if the worker stops and the batch is given back.
        """
        try:
            return self._answer(batch, passed)
        except Exception as exc:
            logger.exception("batch %s of %s could not be settled", batch.id, self._name)
            return self._abandon(batch, exc)
        finally:
            self._leave(batch, passed)

    def _leave(self, batch: Batch, passed: Callable[[], None]) -> None:
        """Let the next batch have its pass, while this one is settled."""
        if self._turns.leave(batch.id):
            passed()
            # Last, because this thread may have to wait for another core.
            self._cores.leave()

    def _abandon(self, batch: Batch, cause: Exception) -> list[Settled]:
        """Settle a batch after an unforeseen error; if that fails too, stop this worker."""
        if worker_state.should_stop is not None:
            return []  # Given back for another worker.
        try:
            return self._settler.abandon(batch.members, cause)
        except Exception:
            logger.critical("this worker cannot settle tasks, and ends", exc_info=True)
            worker_state.should_stop = EX_FAILURE
            return []

    def _answer(self, batch: Batch, passed: Callable[[], None]) -> list[Settled]:
        if batch.members[0].package.is_ensemble:
            return self._answer_ensemble(batch)
        begun = self._settler.begin(batch)
        ready = [member for member, begin in begun.items() if begin.verdict is Verdict.DONE]
        suspects = {m: begin for m, begin in begun.items() if begin.verdict is Verdict.SUSPECT}
        settled, answers = self._forward(batch, ready, self._turns.turn(batch.id))
        if not suspects:
            self._leave(batch, passed)
        settled += self._settler.settle(answers)
        for member, last in suspects.items():
            # In a turn of its own: beside another pass, the suspect would make that one's members
            # suspects, too.
            with self._turns.turn(batch.id):
                settled += self._run_suspect(member, last)
        over = begun.keys() - suspects.keys() - set(ready)
        return settled + [Settled(member, None) for member in over]

    def _answer_ensemble(self, batch: Batch) -> list[Settled]:
        """Have an ensemble's members answered by its stages, and settle each one when it is done.

        No model code runs here, so no member becomes a suspect when this worker ends.
        """
        begun = self._settler.begin(batch, suspects=True)
        ready = [member for member, begin in begun.items() if begin.verdict is Verdict.DONE]
        resumed = {member.request.id for member, begin in begun.items() if begin.attempts > 1}
        members, settled = self._settler.redeem(ready)
        settled += [Settled(member, None) for member in begun.keys() - set(ready)]
        with self._turns.turn(batch.id):
            if members:
                for answers in self._ensemble_answers(batch, members, resumed):
                    settled += self._settler.settle(answers)
        return settled

    def _ensemble_answers(
        self, batch: Batch, members: list[Member], resumed: set[str]
    ) -> Iterator[list[Answer]]:
        try:
            engine = self._engine(members[0].package.version)
        except InfernoError as exc:
            logger.error("batch %s: %s", batch.id, exc)
            return iter([unanswered(batch, members, NotLoaded(exc.detail))])
        assert not isinstance(engine, Engine)
        return engine.answers(batch, members, resumed)

    def _forward(
        self, batch: Batch, members: list[Member], turn: AbstractContextManager[Any]
    ) -> tuple[list[Settled], list[Answer]]:
        """Run the forward pass of members.

        Args:
          batch: the batch of the members.
          members: members of one version, marked as running.
          turn: entered for the pass itself.
        Returns:
          Members that were settled without a pass, and the answers of the others.
        """
        if not members:
            return [], []
        try:
            engine = self._engine(members[0].package.version)
        except PackageError as exc:
            logger.error("batch %s: %s", batch.id, exc)
            return [], unanswered(batch, members, NotLoaded(exc.detail))
        except InfernoError as exc:
            logger.error("batch %s: %s", batch.id, exc)
            return self._settler.fail(members, exc), []
        assert isinstance(engine, Engine)
        members, lost = self._settler.redeem(members)
        if not members:
            return lost, []
        with turn:
            self._cores.take()
            started, started_at = time.monotonic(), time.time()
            prepared = prepare(engine, batch, members, self._watch)
            answers = answer(engine, prepared, self._watch, started_at)
            pass_s = time.monotonic() - started
        self.pass_s = pass_s
        self._pace.note(len(members), sum(member.rows for member in members), pass_s)
        return lost, answers

    def _run_suspect(self, member: Member, last: Begun) -> list[Settled]:
        """Run a member alone, because its worker ended during its last forward pass."""
        if self._settler.exhausted(last):
            return self._settler.bury(member, last)
        batch = new_batch(FlushReason.ISOLATED, [member])
        logger.warning(
            "task %s runs alone: its worker ended during batch %s", member.request.id, last.batch_id
        )
        begun = self._settler.begin(batch, suspects=True)[member]
        if begun.verdict is not Verdict.DONE:
            return [Settled(member, None)]
        settled, answers = self._forward(batch, [member], nullcontext())
        return settled + self._settler.settle(answers)
