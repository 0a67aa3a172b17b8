"""Give each member of a batch its one outcome: result, error, or another attempt.

All outcomes of a batch are written, announced and acknowledged in one round trip, each only if its
message is still in this worker's hands; see `tasks.state.transitions`.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from threading import Event
from typing import Any, TypeVar

import msgspec
import orjson
import redis
from celery.utils.time import get_exponential_backoff_interval

from inferno.batching.former import is_transient
from inferno.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    ForwardFailed,
    InfernoError,
    InputsLost,
    InvalidInput,
    TaskCancelled,
    WorkerLost,
)
from inferno.protocol import packing, tensors
from inferno.protocol.signature import Limits
from inferno.protocol.tasks import Result, TaskState, Timings
from inferno.repository.manifest import Retries
from inferno.settings import RetrySettings, Settings
from tasks.broker import webhook_message as notice
from tasks.broker.connection import UNAVAILABLE, is_refusal
from tasks.broker.lanes import Lanes, Message
from tasks.state.commands import Command
from tasks.state.outcomes import encode_outcome
from tasks.state.sharing import Sharer
from tasks.state.statistics import Tally
from tasks.state.transitions import Begun, Rider, Step, Transitions, Verdict
from workers.batches.forward import Answer, Batch, Member, arguments

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: A worker reads inputs that the web tier has already measured.
UNBOUNDED = Limits(text_bytes=2**31, image_bytes=2**31, rows=2**31)


class Settled(msgspec.Struct, frozen=True, eq=False):
    """What became of a member in this delivery."""

    member: Member
    #: Its state now, or None when this delivery changed nothing: it was over, or no longer ours.
    state: TaskState | None
    error: Exception | None = None
    #: Time in the forward pass, in seconds.
    runtime: float = 0.0
    #: Pause before the next attempt, in seconds.
    delay_s: float | None = None


class _Outcome(msgspec.Struct, frozen=True, eq=False):
    """What shall become of a member, and the messages that follow from it."""

    settled: Settled
    step: Step
    #: For brokers that cannot publish in the same step as they settle.
    messages: tuple[Message, ...] = ()


class Settler:
    """Writes outcomes, and holds them for as long as Redis does not take them."""

    #: Pause between two tries to write, in seconds.
    RETRY_S = 0.5

    def __init__(self, lanes: Lanes, transitions: Transitions, settings: Settings) -> None:
        """Store where outcomes go.

        Args:
          lanes: take further attempts, and webhooks.
          transitions: write outcomes.
          settings: limits of attempts and retries, and which payloads are kept.
        """
        self._lanes = lanes
        self._transitions = transitions
        self._retries = settings.retries
        self._tasks = settings.tasks
        self._sharer = Sharer(settings)
        self._tally = Tally(settings)
        self._stopping = Event()

    def stop(self) -> None:
        """Wait no longer for a Redis that is away; what is not settled is delivered again."""
        self._stopping.set()

    def begin(self, batch: Batch, *, alone: bool = False) -> dict[Member, Begun]:
        """Mark a batch's members as running, and say which of them shall run.

        Args:
          batch: about to have its forward pass.
          alone: it has one member, which may be suspected of having ended its worker.
        """
        riders = [_rider(member) for member in batch.members]
        begun = self._persist(lambda: self._transitions.begin(riders, batch.id, alone=alone))
        answers = {member: begun[member.request.id] for member in batch.members}
        for member, answer in answers.items():
            if answer.verdict is Verdict.DONE and answer.attempts == 1:
                self._tell_of_start(member)
        return answers

    def redeem(self, members: Sequence[Member]) -> tuple[list[Member], list[Settled]]:
        """Fetch the inputs of members that have only claimed them, all of a batch at once.

        Returns:
          the members with their inputs, and what became of those that have lost theirs.
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
                ready.append(_redeemed(member, next(found)) if member.claimed else member)
            except InfernoError as error:
                logger.error("task %s: %s", member.request.id, error)
                errors[member] = error
        return ready, self._persist(lambda: self.refuse(errors)) if errors else []

    def settle(self, answers: Sequence[Answer]) -> list[Settled]:
        """Settle the answers of one batch."""
        outcomes = [self._outcome(answer) for answer in answers]
        then = self._counted(answers, outcomes)
        return self._persist(lambda: self._write(outcomes, then))

    def refuse(self, errors: Mapping[Member, InfernoError]) -> list[Settled]:
        """Settle members without a forward pass.

        Raises:
          redis.RedisError: Redis did not take it. It is not tried again, because the event loop
            must not wait.
        """
        return self._write([self._ended(member, error) for member, error in errors.items()])

    def fail(self, members: Sequence[Member], error: InfernoError) -> list[Settled]:
        """Settle members of a batch whose forward pass cannot be had."""
        return self._persist(lambda: self.refuse(dict.fromkeys(members, error)))

    def bury(self, member: Member, last: Begun) -> list[Settled]:
        """Give up a member that was in too many forward passes during which its worker ended."""
        name = member.package.name
        error = WorkerLost(f"its worker ended during {last.lost} forward passes of {name}")
        logger.error("task %s is dead: %s", member.request.id, error)
        outcome = self._ended(member, error, dead_in=last.batch_id)
        return self._persist(lambda: self._write([outcome]))

    def exhausted(self, last: Begun) -> bool:
        """Return whether a suspect has cost as many workers as it may."""
        return last.lost >= self._tasks.max_attempts

    def abandon(self, members: Sequence[Member], cause: Exception) -> list[Settled]:
        """Settle members of a batch that something unforeseen has happened to, each by itself.

        Raises:
          Exception: one cannot be settled either.
        """
        error = ForwardFailed(f"something went wrong: {type(cause).__name__}: {cause}")
        return [settled for member in members for settled in self.fail([member], error)]

    def _counted(self, answers: Sequence[Answer], outcomes: list[_Outcome]) -> list[Command]:
        """Count those that succeed; return the commands that count the passes of their batch.

        Only now, because the writing of results belongs to the passes, and each member has been in
        all of a pass.
        """
        now = time.time()
        for answer, outcome in zip(answers, outcomes, strict=True):
            if outcome.settled.state is not TaskState.SUCCEEDED:
                continue
            member = answer.member
            package, total_s = member.package, now - member.accepted_at
            outcome.step.commands.append(
                self._tally.deduplicated(package.name, package.version, total_s)
                if answer.twin
                else self._tally.computed(
                    package.name,
                    package.version,
                    total_s,
                    answer.started_at - member.accepted_at,
                    answer.passes,
                    member.rows,
                )
            )
        if not answers:
            return []
        passes = dict.fromkeys(took for answer in answers for took in answer.passes)
        package = answers[0].member.package
        return [*self._tally.passed(package.name, package.version, passes)]

    def _write(self, outcomes: list[_Outcome], then: Sequence[Command] = ()) -> list[Settled]:
        verdicts = self._transitions.finish([outcome.step for outcome in outcomes], then=then)
        settled = []
        for outcome, verdict in zip(outcomes, verdicts, strict=True):
            if verdict is Verdict.DONE:
                settled.append(outcome.settled)
                if not self._lanes.streams:
                    for message in outcome.messages:
                        self._send(message)
            else:
                logger.info(
                    "task %s: an outcome was dropped: %s",
                    outcome.settled.member.request.id,
                    "it was over" if verdict is Verdict.OVER else "another worker has the task",
                )
                settled.append(Settled(outcome.settled.member, None))
        return settled

    def _send(self, message: Message) -> None:
        self._persist(lambda: self._lanes.send(message))

    def _outcome(self, answer: Answer) -> _Outcome:
        member = answer.member
        runtime = answer.ended_at - answer.started_at
        if not isinstance(answer.outputs, InfernoError):
            began = time.perf_counter_ns()
            try:
                payload = encode_outcome(member.request.id, _result(answer))
            except (TypeError, ValueError) as exc:
                # An output that is no JSON, such as text with surrogates.
                unwritable = ForwardFailed(
                    f"{member.package.name} gave an output that cannot be written: {exc}"
                )
                return self._ended(member, unwritable, runtime=runtime)
            extra = self._sharer.succeeded(member.package, arguments(member), payload)
            if answer.passes:
                answer.passes[-1].output_ns += time.perf_counter_ns() - began
            return self._closed(Settled(member, TaskState.SUCCEEDED, None, runtime), payload, extra)
        error = answer.outputs
        if not is_transient(error.__cause__ or error):
            return self._ended(member, error, runtime=runtime)
        retries = member.request.request_dict.get("retries") or 0
        policy = policy_of(member.package.manifest.retries, self._retries)
        if retries < policy.max_retries:
            return self._postponed(member, error, retries, backoff(policy, retries), runtime)
        dead_in = answer.batch.id if policy.max_retries else None
        return self._ended(member, error, runtime=runtime, dead_in=dead_in)

    def _postponed(
        self, member: Member, error: InfernoError, retries: int, delay_s: float, runtime: float
    ) -> _Outcome:
        request = member.request
        logger.warning(
            "task %s: retry %d in %.1f s after: %s", request.id, retries + 1, delay_s, error
        )
        due = time.time() + delay_s
        message = Message(
            queue=member.package.name,
            name=request.type,
            task_id=request.id,
            kwargs=request.kwargs,
            priority=member.priority,
            eta=datetime.fromtimestamp(due, UTC),
            expires=request.expires,
            retries=retries + 1,
            kwargsrepr=request.kwargsrepr,
        )
        commands = self._transitions.commands.retried(request.id, retries + 1, due)
        if self._lanes.streams:
            commands.append(self._lanes.delay(message, due))
        settled = Settled(member, TaskState.RETRYING, error, runtime, delay_s)
        return _Outcome(settled, Step(request.id, member.held, commands), (message,))

    def _ended(
        self,
        member: Member,
        error: InfernoError,
        *,
        runtime: float = 0.0,
        dead_in: str | None = None,
    ) -> _Outcome:
        state = TaskState.FAILED
        if isinstance(error, DeadlineExceeded):
            state = TaskState.EXPIRED
        elif isinstance(error, TaskCancelled):
            state = TaskState.CANCELLED
        payload = encode_outcome(member.request.id, error)
        extra: list[Command] = [*self._sharer.ended(member.package, arguments(member))]
        if dead_in is not None:
            fields = _dead_letter(member, error, dead_in)
            extra += self._transitions.commands.buried(member.request.id, fields)
        dead = dead_in is not None
        return self._closed(Settled(member, state, error, runtime), payload, extra, dead=dead)

    def _closed(
        self, settled: Settled, payload: bytes, extra: Sequence[Command], *, dead: bool = False
    ) -> _Outcome:
        member, state = settled.member, settled.state
        assert state is not None
        task_id = member.request.id
        facts = {} if state is TaskState.SUCCEEDED else _facts(member)
        keep = self._tasks.keep_payloads
        kept = keep == "always" or (keep == "failed" and state is not TaskState.SUCCEEDED)
        keep_s = max(self._tasks.result_ttl_s if kept else 0, self._tasks.dead_ttl_s if dead else 0)
        commands = self._transitions.commands.ended(facts, task_id, state, payload, keep_s)
        commands += extra
        if state is not TaskState.SUCCEEDED:
            package = member.package
            commands.append(self._tally.failed(package.name, package.version, member.accepted_at))
        if kept:
            commands += self._transitions.commands.kept(task_id, _asked(member))
        messages = _webhooks(member, "completed")
        if self._lanes.streams:
            commands += [self._lanes.enqueue(message) for message in messages]
        return _Outcome(settled, Step(task_id, member.held, commands), messages)

    def _tell_of_start(self, member: Member) -> None:
        for message in _webhooks(member, "start"):
            try:
                self._lanes.send(message)
            except BrokerUnavailable as exc:
                logger.warning("task %s: its start is not told: %s", member.request.id, exc)

    def _persist(self, write: Callable[[], T]) -> T:
        """Write, and wait as long as it takes for a Redis that is away or full."""
        while True:
            try:
                return write()
            except (*UNAVAILABLE, BrokerUnavailable, redis.ResponseError) as exc:
                passing = not isinstance(exc, redis.ResponseError) or isinstance(exc, UNAVAILABLE)
                if self._stopping.is_set() or not (passing or is_refusal(exc)):
                    raise
                logger.warning("Redis does not take outcomes (%s); trying again", exc)
                self._stopping.wait(self.RETRY_S)


def policy_of(given: Retries, default: RetrySettings) -> RetrySettings:
    """Return a model's policy of retries, with the settings where its package does not say."""
    return default.model_copy(update=given.model_dump(exclude_none=True))


def backoff(policy: RetrySettings, retries: int) -> float:
    """Return the delay before the next attempt, in seconds.

    It is Celery's exponential backoff: `backoff_s` times 2 to the power of `retries`, at most
    `max_backoff_s`; with jitter, anything from zero to that.
    """
    # Celery counts in whole units; milliseconds keep its jitter fine enough.
    milliseconds: int = get_exponential_backoff_interval(
        factor=round(policy.backoff_s * 1000),
        retries=retries,
        maximum=round(policy.max_backoff_s * 1000),
        full_jitter=policy.jitter,
    )
    return milliseconds / 1000


def _redeemed(member: Member, payload: bytes | None) -> Member:
    if payload is None:
        raise InputsLost("its inputs have been deleted before it could run")
    try:
        given = packing.unpack(payload)
    except (TypeError, ValueError) as exc:
        raise InvalidInput(f"its inputs cannot be read: {exc}", "inputs") from None
    inputs = member.package.signature.parse(given, UNBOUNDED)
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


def _facts(member: Member) -> dict[str, Any]:
    """Return what the record of a task says from the start; other clients write none.

    Whoever succeeds has begun, and has a record.
    """
    return {
        "model": member.package.name,
        "version": member.package.version,
        "accepted_at": member.accepted_at,
        "priority": member.priority,
    }


def _asked(member: Member) -> bytes:
    return orjson.dumps(member.request.kwargs)


def _dead_letter(member: Member, error: InfernoError, batch_id: str) -> dict[str, Any]:
    cause = error.__cause__ or error
    return {
        "model": member.package.name,
        "version": member.package.version,
        "priority": member.priority,
        "code": error.code,
        "error": str(error),
        "traceback": "".join(traceback.format_exception(cause)),
        "batch_id": batch_id,
        "retries": member.request.request_dict.get("retries") or 0,
        "accepted_at": member.accepted_at,
        "died_at": time.time(),
        "payload": _asked(member),
    }


def _webhooks(member: Member, event: str) -> tuple[Message, ...]:
    if member.webhook is None or event not in member.webhook.events:
        return ()
    package = member.package
    return (
        notice.message(
            member.webhook.url,
            member.request.id,
            event,
            package.name,
            package.version,
            time.time(),
        ),
    )


def _result(answer: Answer) -> bytes:
    assert isinstance(answer.outputs, dict)
    member = answer.member
    signature = member.package.signature
    outputs = {
        name: tensors.encode(array, signature.output(name).dtype, member.codec)
        for name, array in answer.outputs.items()
        if member.outputs is None or name in member.outputs
    }
    timings = Timings(
        queue_ms=_ms(member.received_at - member.accepted_at),
        batch_wait_ms=_ms(answer.started_at - member.received_at),
        inference_ms=_ms(answer.ended_at - answer.started_at),
        total_ms=_ms(time.time() - member.accepted_at),
    )
    return msgspec.json.encode(
        Result(
            model=member.package.name,
            version=member.package.version,
            # orjson writes numpy arrays, and float32 in its shortest form, which msgspec does not.
            outputs=msgspec.Raw(orjson.dumps(outputs, option=orjson.OPT_SERIALIZE_NUMPY)),
            timings=timings,
            batch=answer.batch,
            worker=member.request.hostname,
            stages=answer.stages,
        )
    )


def _ms(seconds: float) -> float:
    # The two ends may come from the clocks of two machines.
    return round(max(seconds, 0.0) * 1000, 3)
