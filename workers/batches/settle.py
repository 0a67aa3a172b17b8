"""Settle step: write the outcomes of a batch's members, in a thread of the worker's pool.

The outcomes of a batch are written, announced and acknowledged in one round trip, each only if its
message is still in this worker's hands; see `tasks.state.transitions`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import TypeVar

import msgspec
import redis

from inferno.errors import (
    BrokerUnavailable,
    ForwardFailed,
    InfernoError,
    InputsLost,
    InvalidInput,
    WorkerLost,
)
from inferno.protocol import packing
from inferno.protocol.limits import Limits
from inferno.settings import Settings
from tasks.broker.connection import UNAVAILABLE
from tasks.broker.lanes import Lanes, TaskMessage
from tasks.state.commands import Command
from tasks.state.transitions import Begun, Rider, Transitions, Verdict
from tasks.transport.refusals import is_refusal
from workers.batches.forward import Answer
from workers.batches.member import Batch, Member
from workers.batches.settlement import Settled, Settlement, Settlements, webhooks

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Settler:
    """Writes outcomes, and holds them for as long as Redis does not accept them."""

    #: Pause between two attempts to write, in seconds.
    RETRY_S = 0.5

    def __init__(self, lanes: Lanes, transitions: Transitions, settings: Settings) -> None:
        """Store where outcomes go.

        Args:
          lanes: take further attempts and webhooks.
          transitions: write outcomes.
          settings: limits of inputs, attempts and retries, and which payloads are kept.
        """
        self._lanes = lanes
        self._transitions = transitions
        self._limits = Limits.of(settings.limits)
        self._max_attempts = settings.tasks.max_attempts
        self._settlements = Settlements(lanes, transitions, settings)
        self._stopping = Event()

    def stop(self) -> None:
        """Wait no longer for an unavailable Redis; unsettled tasks are delivered again."""
        self._stopping.set()

    def begin(self, batch: Batch, *, suspects: bool = False) -> dict[Member, Begun]:
        """Mark members as running, and return for each whether it may run.

        Args:
          batch: a batch just before its forward pass.
          suspects: also start suspects, the members whose worker ended during a forward pass. By
            default their verdict is SUSPECT, so that they do not endanger others.
        """
        riders = [_rider(member) for member in batch.members]
        begun = self._persist(lambda: self._transitions.begin(riders, batch.id, alone=suspects))
        answers = {member: begun[member.request.id] for member in batch.members}
        for member, answer in answers.items():
            if answer.verdict is Verdict.DONE and answer.attempts == 1:
                self._announce_start(member)
        return answers

    def redeem(self, members: Sequence[Member]) -> tuple[list[Member], list[Settled]]:
        """Fetch inputs that are under a key of their own, for all members at once.

        Returns:
          The members with their inputs, and the settled members whose inputs are lost.
        """
        claimed = [member for member in members if member.claimed]
        if not claimed:
            return list(members), []
        task_ids = [member.request.id for member in claimed]
        found = iter(self._persist(lambda: self._transitions.claimed(task_ids)))
        ready: list[Member] = []
        errors: dict[Member, InfernoError] = {}
        for member in members:
            try:
                if member.claimed:
                    member = _redeemed(member, next(found), self._limits)
                ready.append(member)
            except InfernoError as error:
                logger.error("task %s: %s", member.request.id, error)
                errors[member] = error
        return ready, self._persist(lambda: self.refuse(errors)) if errors else []

    def settle(self, answers: Sequence[Answer]) -> list[Settled]:
        """Settle the answers of one batch."""
        settlements = [self._settlements.of_answer(answer) for answer in answers]
        then = self._settlements.statistics(answers, settlements)
        return self._persist(lambda: self._write(settlements, then))

    def refuse(self, errors: Mapping[Member, InfernoError]) -> list[Settled]:
        """Settle members without a forward pass.

        Raises:
          redis.RedisError: Redis did not accept it. There is no second attempt, because the event
            loop must not wait.
        """
        return self._write(
            [self._settlements.ended(member, error) for member, error in errors.items()]
        )

    def fail(self, members: Sequence[Member], error: InfernoError) -> list[Settled]:
        """Settle members whose forward pass is impossible."""
        return self._persist(lambda: self.refuse(dict.fromkeys(members, error)))

    def bury(self, member: Member, last: Begun) -> list[Settled]:
        """Give up a suspect whose worker has ended during too many of its forward passes."""
        name = member.package.name
        error = WorkerLost(f"its worker ended during {last.lost} forward passes of {name}")
        logger.error("task %s is dead: %s", member.request.id, error)
        settlement = self._settlements.ended(member, error, dead_in=last.batch_id)
        return self._persist(lambda: self._write([settlement]))

    def exhausted(self, last: Begun) -> bool:
        """Return whether a suspect has cost as many workers as it may."""
        return last.lost >= self._max_attempts

    def abandon(self, members: Sequence[Member], cause: Exception) -> list[Settled]:
        """Settle members of a batch after an unforeseen error, one by one.

        Raises:
          Exception: a member cannot be settled either.
        """
        error = ForwardFailed(f"something went wrong: {type(cause).__name__}: {cause}")
        return [settled for member in members for settled in self.fail([member], error)]

    def _write(
        self, settlements: Sequence[Settlement], then: Sequence[Command] = ()
    ) -> list[Settled]:
        verdicts = self._transitions.finish([one.step for one in settlements], then=then)
        settled = []
        for settlement, verdict in zip(settlements, verdicts, strict=True):
            if verdict is Verdict.DONE:
                settled.append(settlement.settled)
                if not self._lanes.streams:
                    for message in settlement.messages:
                        self._send(message)
            else:
                logger.info(
                    "task %s: an outcome was dropped: %s",
                    settlement.settled.member.request.id,
                    "it was over" if verdict is Verdict.OVER else "another worker has the task",
                )
                settled.append(Settled(settlement.settled.member, None))
        return settled

    def _send(self, message: TaskMessage) -> None:
        self._persist(lambda: self._lanes.send(message))

    def _announce_start(self, member: Member) -> None:
        for message in webhooks(member, "start"):
            try:
                self._lanes.send(message)
            except BrokerUnavailable as exc:
                logger.warning("task %s: no webhook for its start: %s", member.request.id, exc)

    def _persist(self, write: Callable[[], T]) -> T:
        """Write, and retry for as long as Redis is unavailable or full."""
        while True:
            try:
                return write()
            except (*UNAVAILABLE, BrokerUnavailable, redis.ResponseError) as exc:
                passing = not isinstance(exc, redis.ResponseError) or isinstance(exc, UNAVAILABLE)
                if self._stopping.is_set() or not (passing or is_refusal(exc)):
                    raise
                logger.warning("Redis does not accept outcomes (%s); trying again", exc)
                self._stopping.wait(self.RETRY_S)


def _redeemed(member: Member, payload: bytes | None, limits: Limits) -> Member:
    if payload is None:
        raise InputsLost("its inputs were deleted before it could run")
    try:
        given = packing.unpack(payload)
    except (TypeError, ValueError) as exc:
        raise InvalidInput(f"its inputs cannot be read: {exc}", "inputs") from None
    inputs = member.package.signature.parse(given, limits)
    return msgspec.structs.replace(member, inputs=inputs)


def _rider(member: Member) -> Rider:
    return Rider(
        member.request.id,
        member.held,
        member.package.name,
        member.package.version,
        member.accepted_at,
        member.priority,
    )
