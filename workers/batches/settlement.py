"""Settle step: what each member's outcome is, and the Redis commands that write it.

It writes nothing itself; see `workers.batches.settle`.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import orjson
from celery.utils.time import get_exponential_backoff_interval

from inferno import names
from inferno.batching.isolation import is_transient
from inferno.errors import DeadlineExceeded, ForwardFailed, InfernoError, TaskCancelled
from inferno.protocol import tensors
from inferno.protocol.tasks import Result, TaskState, Timings
from inferno.repository.manifest import Retries
from inferno.settings import RetrySettings, Settings
from tasks.broker import webhook_message
from tasks.broker.lanes import Lanes, TaskMessage
from tasks.state.commands import Command
from tasks.state.outcomes import encode_outcome, writable
from tasks.state.sharing import Sharer
from tasks.state.statistics import Tally
from tasks.state.transitions import Step, Transitions
from workers.batches.forward import Answer
from workers.batches.member import Member, arguments

logger = logging.getLogger(__name__)


class Settled(msgspec.Struct, frozen=True, eq=False):
    """What became of a member in this delivery."""

    member: Member
    #: Its new state, or None if this delivery changed nothing: the task was over or taken over.
    state: TaskState | None
    error: Exception | None = None
    #: Time in the forward pass, in seconds.
    runtime: float = 0.0
    #: Pause before the next attempt, in seconds.
    delay_s: float | None = None


class Settlement(msgspec.Struct, frozen=True, eq=False):
    """A member's outcome, before it is written."""

    #: What becomes of the member once `step` is done.
    settled: Settled
    step: Step
    #: Messages to send afterwards, on brokers that cannot publish in the same step.
    messages: tuple[TaskMessage, ...] = ()


class Settlements:
    """Decides the outcomes of members: result, error or another attempt."""

    def __init__(self, lanes: Lanes, transitions: Transitions, settings: Settings) -> None:
        """Store what outcomes depend on.

        Args:
          lanes: pack messages of further attempts and of webhooks.
          transitions: build the commands that end tasks.
          settings: limits of attempts and retries, and which payloads are kept.
        """
        self._lanes = lanes
        self._transitions = transitions
        self._retries = settings.retries
        self._tasks = settings.tasks
        self._sharer = Sharer(settings)
        self._tally = Tally(settings)

    def of_answer(self, answer: Answer) -> Settlement:
        """Return the outcome of a member that was in a forward pass."""
        member = answer.member
        runtime = answer.ended_at - answer.started_at
        if not isinstance(answer.outputs, InfernoError):
            return self._succeeded(answer, runtime)
        error = answer.outputs
        if not is_transient(error.__cause__ or error):
            return self.ended(member, error, runtime=runtime)
        retries = member.request.request_dict.get("retries") or 0
        policy = _retry_policy(member.package.manifest.retries, self._retries)
        if retries < policy.max_retries:
            return self._retried(member, error, retries, _backoff_s(policy, retries), runtime)
        dead_in = answer.batch.id if policy.max_retries else None
        return self.ended(member, error, runtime=runtime, dead_in=dead_in)

    def ended(
        self,
        member: Member,
        error: InfernoError,
        *,
        runtime: float = 0.0,
        dead_in: str | None = None,
    ) -> Settlement:
        """Return the outcome of a member that ends with an error.

        Args:
          member: the member.
          error: the reason.
          runtime: time in the forward pass, in seconds.
          dead_in: id of the batch that it died in, if it becomes a dead letter.
        """
        state = TaskState.FAILED
        if isinstance(error, DeadlineExceeded):
            state = TaskState.EXPIRED
        elif isinstance(error, TaskCancelled):
            state = TaskState.CANCELLED
        payload = encode_outcome(member.request.id, error)
        extra: list[Command] = [*self._sharer.ended(member.package, arguments(member))]
        dead = dead_in is not None
        if dead_in is not None:
            fields = _dead_letter(member, error, dead_in)
            extra += self._transitions.commands.buried(member.request.id, fields)
        return self._over(Settled(member, state, error, runtime), payload, extra, dead=dead)

    def statistics(
        self, answers: Sequence[Answer], settlements: Sequence[Settlement]
    ) -> list[Command]:
        """Count the members that succeed, and return the commands that count their passes.

        Call it after all results are encoded: each pass includes the time of its results.
        """
        now = time.time()
        for answer, settlement in zip(answers, settlements, strict=True):
            if settlement.settled.state is not TaskState.SUCCEEDED:
                continue
            member = answer.member
            package, total_s = member.package, now - member.accepted_at
            settlement.step.commands.append(
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

    def _succeeded(self, answer: Answer, runtime: float) -> Settlement:
        member = answer.member
        began = time.perf_counter_ns()
        try:
            payload = encode_outcome(member.request.id, _result(answer))
        except (TypeError, ValueError) as exc:
            # An output that JSON cannot hold, such as text with surrogates.
            unwritable = ForwardFailed(
                f"{member.package.name} returned an output that cannot be written: {exc}"
            )
            return self.ended(member, unwritable, runtime=runtime)
        extra = self._sharer.succeeded(member.package, arguments(member), payload)
        if answer.passes:
            answer.passes[-1].output_ns += time.perf_counter_ns() - began
        return self._over(Settled(member, TaskState.SUCCEEDED, None, runtime), payload, extra)

    def _retried(
        self, member: Member, error: InfernoError, retries: int, delay_s: float, runtime: float
    ) -> Settlement:
        request = member.request
        logger.warning(
            "task %s: retry %d in %.1f s after: %s", request.id, retries + 1, delay_s, error
        )
        due = time.time() + delay_s
        message = TaskMessage(
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
        return Settlement(settled, Step(request.id, member.held, commands), (message,))

    def _over(
        self, settled: Settled, payload: bytes, extra: Sequence[Command], *, dead: bool = False
    ) -> Settlement:
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
            commands += self._transitions.commands.kept(task_id, _payload(member))
        messages = webhooks(member, "completed")
        if self._lanes.streams:
            commands += [self._lanes.enqueue(message) for message in messages]
        return Settlement(settled, Step(task_id, member.held, commands), messages)


def webhooks(member: Member, event: str) -> tuple[TaskMessage, ...]:
    """Return the messages that deliver an event: one, or none if the client did not ask for it."""
    if member.webhook is None or event not in member.webhook.events:
        return ()
    package = member.package
    return (
        webhook_message.message(
            member.webhook.url,
            member.request.id,
            event,
            package.name,
            package.version,
            time.time(),
        ),
    )


def _retry_policy(given: Retries, default: RetrySettings) -> RetrySettings:
    """Return a model's retry policy: its package's values, else those of the settings."""
    return default.model_copy(update=given.model_dump(exclude_none=True))


def _backoff_s(policy: RetrySettings, retries: int) -> float:
    """Return the delay before the next attempt, in seconds.

    Celery's exponential backoff: `backoff_s` times 2 to the power of `retries`, at most
    `max_backoff_s`; with jitter, a random part of that.
    """
    # Celery's jitter is in whole units, so count milliseconds.
    milliseconds: int = get_exponential_backoff_interval(
        factor=round(policy.backoff_s * 1000),
        retries=retries,
        maximum=round(policy.max_backoff_s * 1000),
        full_jitter=policy.jitter,
    )
    return milliseconds / 1000


def _facts(member: Member) -> dict[str, Any]:
    """Return the fields that a record has from the start.

    Tasks of other Celery clients may have no record yet. Tasks that succeed have begun, so they
    have one.
    """
    return {
        "model": member.package.name,
        "version": member.package.version,
        "accepted_at": member.accepted_at,
        "priority": member.priority,
    }


def _payload(member: Member) -> bytes:
    return orjson.dumps(member.request.kwargs)


def _dead_letter(member: Member, error: InfernoError, batch_id: str) -> dict[str, Any]:
    cause = error.__cause__ or error
    return {
        "model": member.package.name,
        "version": member.package.version,
        "priority": member.priority,
        "code": error.code,
        "error": writable(str(error)),
        "traceback": writable("".join(traceback.format_exception(cause))),
        "batch_id": batch_id,
        "retries": member.request.request_dict.get("retries") or 0,
        "accepted_at": member.accepted_at,
        "died_at": time.time(),
        "payload": _payload(member),
    }


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
            # orjson writes numpy arrays, and float32 in its shortest form; msgspec does neither.
            outputs=msgspec.Raw(orjson.dumps(outputs, option=orjson.OPT_SERIALIZE_NUMPY)),
            timings=timings,
            batch=answer.batch,
            worker=names.worker_label(),
            stages=answer.stages,
        )
    )


def _ms(seconds: float) -> float:
    # Differences may be negative: the two ends can come from the clocks of two machines.
    return round(max(seconds, 0.0) * 1000, 3)
