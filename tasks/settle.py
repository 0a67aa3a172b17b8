"""Give each member of a batch its one outcome: result, error, or another attempt.

All outcomes of a batch are written, announced and closed in one round trip. The message is
acknowledged afterwards, by the consumer: a worker killed in between leaves a task that is over, and
the next delivery of it is dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Event
from typing import TypeVar

import msgspec
import orjson
import redis
from celery import Celery
from celery.utils.time import get_exponential_backoff_interval

from inferno.batching import is_transient
from inferno.errors import DeadlineExceeded, ForwardFailed, InfernoError
from inferno.protocol import tensors
from inferno.protocol.tasks import Result, TaskState, Timings
from inferno.repository import Retries
from tasks.connection import UNAVAILABLE
from tasks.infer import Answer, Batch, Member
from tasks.records import Records, encode_outcome
from tasks.submit import to_redis

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Settled:
    """What became of a member in this delivery."""

    member: Member
    #: Its state now, or None when it had its outcome before this delivery.
    state: TaskState | None
    error: Exception | None = None
    #: Time in the forward pass, in seconds.
    runtime: float = 0.0


class Settler:
    """Writes outcomes, and holds them for as long as Redis does not take them."""

    #: Pause between two tries to write, in seconds.
    RETRY_S = 0.5

    def __init__(self, app: Celery, records: Records) -> None:
        """Store where outcomes go.

        Args:
          app: publishes further attempts.
          records: stores outcomes.
        """
        self._app = app
        self._records = records
        self._stopping = Event()

    def stop(self) -> None:
        """Wait no longer for a Redis that is away; what is not settled is delivered again."""
        self._stopping.set()

    def begin(self, batch: Batch) -> list[Member]:
        """Mark a batch's members as running; return those that shall run.

        Members that are over already, by an earlier delivery or their client, are left out.
        """
        fields = {
            member.request.id: {
                "model": member.package.name,
                "version": member.package.version,
                "accepted_at": member.accepted_at,
                "priority": member.priority,
            }
            for member in batch.members
        }
        fresh = self._persist(lambda: self._records.begin(fields, batch.id))
        return [member for member in batch.members if member.request.id in fresh]

    def settle(self, answers: Sequence[Answer]) -> list[Settled]:
        """Settle the answers of one batch."""
        settled: list[Settled] = []
        outcomes: dict[str, tuple[TaskState, bytes]] = {}
        for answer in answers:
            error = answer.outputs if isinstance(answer.outputs, Exception) else None
            runtime = answer.ended_at - answer.started_at
            if error is not None and self._postpone(answer.member, error):
                settled.append(Settled(answer.member, TaskState.RETRYING, error, runtime))
                continue
            state, payload = _outcome(answer)
            outcomes[answer.member.request.id] = (state, payload)
            settled.append(Settled(answer.member, state, error, runtime))
        return self._persist(lambda: self._write(settled, outcomes))

    def refuse(self, errors: Mapping[Member, InfernoError]) -> list[Settled]:
        """Settle members without a forward pass.

        Raises:
          redis.RedisError: Redis did not take it. It is not tried again, because the event loop
            must not wait.
        """
        settled, outcomes = [], {}
        for member, error in errors.items():
            state = TaskState.EXPIRED if isinstance(error, DeadlineExceeded) else TaskState.FAILED
            outcomes[member.request.id] = (state, encode_outcome(member.request.id, error))
            settled.append(Settled(member, state, error))
        return self._write(settled, outcomes)

    def _write(
        self, settled: list[Settled], outcomes: Mapping[str, tuple[TaskState, bytes]]
    ) -> list[Settled]:
        if not outcomes:
            return settled
        first = self._records.settle(outcomes)
        late = outcomes.keys() - first
        if late:
            logger.info("%d outcomes came after the first and were dropped", len(late))
        return [Settled(s.member, None) if s.member.request.id in late else s for s in settled]

    def _postpone(self, member: Member, error: Exception) -> bool:
        """Publish another attempt if the error may pass and attempts are left."""
        policy = member.package.manifest.retries
        done = member.request.request_dict.get("retries") or 0
        if done >= policy.max_retries or not is_transient(error.__cause__ or error):
            return False
        delay = backoff(policy, done)
        logger.warning(
            "task %s: retry %d of %d in %.1f s after: %s",
            member.request.id, done + 1, policy.max_retries, delay, error,
        )  # fmt: skip
        self._persist(lambda: self._republish(member, done + 1, delay))
        return True

    def _republish(self, member: Member, retries: int, delay: float) -> None:
        request = member.request
        self._records.postpone([request.id])
        message = self._app.amqp.as_task_v2(
            request.id,
            request.type,
            kwargs=request.kwargs,
            eta=self._app.now() + timedelta(seconds=delay),
            expires=request.expires,
            retries=retries,
            argsrepr=request.argsrepr,
            kwargsrepr=request.kwargsrepr,
        )
        with self._app.producer_or_acquire() as producer:
            self._app.amqp.send_task_message(
                producer, request.type, message, queue=member.package.name,
                priority=to_redis(member.priority),
            )  # fmt: skip

    def _persist(self, write: Callable[[], T]) -> T:
        """Write, and wait as long as it takes for a Redis that is away or full."""
        while True:
            try:
                return write()
            except (*UNAVAILABLE, redis.OutOfMemoryError, redis.ReadOnlyError) as exc:
                if self._stopping.is_set():
                    raise
                logger.warning("Redis does not take outcomes (%s); trying again", exc)
                self._stopping.wait(self.RETRY_S)


def backoff(policy: Retries, retries: int) -> float:
    """Return the delay before the next attempt, in seconds.

    It is Celery's exponential backoff with full jitter.
    """
    # Celery counts in whole units; milliseconds keep its jitter fine enough.
    milliseconds: int = get_exponential_backoff_interval(
        factor=round(policy.backoff_s * 1000),
        retries=retries,
        maximum=round(policy.max_backoff_s * 1000),
        full_jitter=True,
    )
    return milliseconds / 1000


def _outcome(answer: Answer) -> tuple[TaskState, bytes]:
    task_id = answer.member.request.id
    if isinstance(answer.outputs, InfernoError):
        return TaskState.FAILED, encode_outcome(task_id, answer.outputs)
    try:
        return TaskState.SUCCEEDED, encode_outcome(task_id, _result(answer))
    except (
        TypeError,
        ValueError,
    ) as exc:  # An output that is no JSON, such as text with surrogates.
        error = ForwardFailed(
            f"{answer.member.package.name} gave an output that cannot be written: {exc}"
        )
        return TaskState.FAILED, encode_outcome(task_id, error)


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
        )
    )


def _ms(seconds: float) -> float:
    # The two ends may come from the clocks of two machines.
    return round(max(seconds, 0.0) * 1000, 3)
