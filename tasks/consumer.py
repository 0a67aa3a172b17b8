"""The batch-aware consumer of one lane: a `celery_batches.Batches` task that is safe.

    message -> Member -> BatchFormer -> executor (infer, settle) -> acknowledge

celery-batches supplies the task type that consumes messages in groups; what it lacks (it drops
batches that raise, cuts batches by a free-running timer, and tells Celery nothing) is replaced
here. Everything in this module runs on the worker's event loop, so that it needs no locks; only
`_work` runs in a thread of the pool.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.request import Request, create_request_cls
from celery_batches import Batches
from kombu.asynchronous.timer import Entry

from inferno import names
from inferno.batching import BatchFormer, Flush, Waiting, bucket
from inferno.engine import Engine, count_rows
from inferno.errors import DeadlineExceeded, InfernoError, InvalidInput, ModelNotFound
from inferno.protocol.signature import Limits
from inferno.repository import Model, Package
from tasks import events
from tasks.connection import UNAVAILABLE
from tasks.infer import Batch, Member, Watch, answer
from tasks.settle import Settled, Settler
from tasks.submit import from_redis

logger = logging.getLogger(__name__)

#: A worker reads inputs that the web tier has already measured.
_UNBOUNDED = Limits(text_bytes=2**31, image_bytes=2**31, rows=2**31)


class InferenceTask(Batches):  # type: ignore[misc]
    """The Celery task `infer.<model>`."""

    acks_late = True
    send_events = True
    ignore_result = False

    def __init__(
        self,
        model: Model,
        engine: Callable[[int], Engine],
        settler: Settler,
        *,
        executors: int,
        former: BatchFormer[Member],
        watch: Watch,
    ) -> None:
        """Serve one model.

        Args:
          model: whose lane this is.
          engine: gives the loaded engine of a version; it may take long the first time.
          settler: writes outcomes.
          executors: forward passes at the same time.
          former: decides which tasks leave together.
          watch: guards against a model that hangs.
        """
        super().__init__()
        self.name = names.task_name(model.name)
        self._model = model
        self._engine = engine
        self._settler = settler
        self._executors = executors
        self._former = former
        self._watch = watch
        self._running = 0
        self._consumer: Consumer = None
        self._wake_up: Entry | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run outside a worker: a batch needs the engine that only a worker holds."""
        raise NotImplementedError(
            f"{self.name} runs in a worker: celery -A tasks worker -Q {self._model.name}"
        )

    def Strategy(self, task: Batches, app: Celery, consumer: Consumer) -> Callable[..., None]:
        """Return the handler of messages; called again after each reconnect to the broker."""
        # What waited belongs to the old connection, and the broker hands it over again.
        self._former.clear()
        self._wake_up = None
        self._consumer = consumer
        events.coalesce(consumer)
        make_request = create_request_cls(
            Request, task, consumer.pool, consumer.hostname, consumer.event_dispatcher, app=app
        )

        def handle(
            message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any
        ) -> None:
            # Celery's own `ack` defers to the loop's next round, which comes only when something
            # else happens: up to a second later. We are on the loop already.
            request = make_request(
                message,
                on_ack=message.ack_log_error,
                on_reject=message.reject_log_error,
                app=app,
                hostname=consumer.hostname,
                eventer=consumer.event_dispatcher,
                task=task,
                connection_errors=consumer.connection_errors,
                headers=message.headers,
                body=message.body,
                decoded=False,
                utc=True,
            )
            self._receive(request)
            for callback in callbacks:
                callback(request)

        return handle

    def _receive(self, request: Request) -> None:
        events.received(self._consumer, request)
        if request.id in worker_state.revoked and request.revoked():
            return  # By `celery control revoke`: Celery has stored the outcome.
        delay = request.eta.timestamp() - time.time() if request.eta else 0
        if delay > 0:
            # It holds no place in the prefetch count while it waits.
            self._consumer.qos.increment_eventually()
            self._consumer.timer.call_after(delay, self._receive_due, (request,), priority=6)
        else:
            self._admit(request)

    def _receive_due(self, request: Request) -> None:
        self._consumer.qos.decrement_eventually()
        self._admit(request)

    def _admit(self, request: Request) -> None:
        received_at = time.time()
        package = self._model.package()
        kwargs = request.kwargs
        try:
            package = self._package(kwargs)
            member = _member(request, package, received_at)
        except InfernoError as error:
            stub = Member(request, package, {}, 0, None, "json", 0, received_at, received_at)
            self._refuse({stub: error})
            return
        now = time.monotonic()
        deadline = now + request.expires.timestamp() - received_at if request.expires else None
        pad = tuple(package.manifest.batching.pad)
        self._former.add(
            Waiting(member, bucket(package.version, member.inputs, pad), member.rows, now, deadline)
        )
        self._pump()

    def _package(self, kwargs: dict[str, Any]) -> Package:
        version = kwargs.get("version")
        if version is not None and type(version) is not int:
            raise ModelNotFound(
                f"expected the version as a whole number, got {version!r}", "version"
            )
        return self._model.package(version)

    def _pump(self) -> None:
        """Let leave what should leave now, and see to it that this is asked again in time."""
        if worker_state.should_stop is not None or worker_state.should_terminate is not None:
            # What waits goes back to the lane when the channel closes, and no timer fires any more.
            self._consumer.event_dispatcher.flush()
            return
        now = time.monotonic()
        self._expire(now)
        while self._running < self._executors and (flush := self._former.flush(now)) is not None:
            self._start(flush)
        self._set_wake_up()

    def _set_wake_up(self) -> None:
        if self._wake_up is not None:
            self._wake_up.cancel()
            self._wake_up = None
        dues = [self._former.next_deadline()]
        if self._running < self._executors:
            dues.append(self._former.next_due())
        if due := min((due for due in dues if due is not None), default=None):
            delay = max(due - time.monotonic(), 0)
            self._wake_up = self._consumer.timer.call_after(delay, self._pump)

    def _expire(self, now: float) -> None:
        deadline = self._former.next_deadline()
        if deadline is not None and deadline <= now:
            late = self._former.drop(lambda w: w.deadline is not None and w.deadline <= now)
            self._refuse({waiting.task: _too_late() for waiting in late})

    def _refuse(self, errors: dict[Member, InfernoError]) -> None:
        try:
            settled = self._settler.refuse(errors)
        except UNAVAILABLE:
            # Not acknowledged, so that the broker hands the tasks over again.
            logger.warning("%d tasks could not be settled", len(errors), exc_info=True)
            return
        self._acknowledge(settled)

    def _start(self, flush: Flush[Member]) -> None:
        batch = Batch(uuid.uuid4().hex, flush.reason, [waiting.task for waiting in flush.members])
        for member in batch.members:
            events.started(member.request)
        self._running += 1
        self._former.started()
        self._consumer.pool.apply_async(self._work, (batch,))

    def _work(self, batch: Batch) -> None:
        """Answer and settle a batch, in a thread of the pool."""
        settled: list[Settled] = []
        try:
            settled = self._answer(batch)
        except Exception:
            # Not acknowledged, so that the broker hands the tasks over again.
            logger.exception("batch %s of %s could not be settled", batch.id, self.name)
        finally:
            self._consumer.call_soon(self._finish, settled)

    def _answer(self, batch: Batch) -> list[Settled]:
        wanted = self._settler.begin(batch)
        over = [Settled(member, None) for member in batch.members if member not in wanted]
        if not wanted:
            return over
        try:
            engine = self._engine(wanted[0].package.version)
        except InfernoError as exc:
            logger.error("batch %s: %s", batch.id, exc)
            return over + self._settler.refuse(dict.fromkeys(wanted, exc))
        return over + self._settler.settle(answer(engine, batch, wanted, self._watch))

    def _finish(self, settled: list[Settled]) -> None:
        self._running -= 1
        self._former.finished()
        self._acknowledge(settled)
        self._pump()

    def _acknowledge(self, settled: list[Settled]) -> None:
        for item in settled:
            item.member.request.acknowledge()
            events.ended(item)


def _member(request: Request, package: Package, received_at: float) -> Member:
    kwargs = request.kwargs
    inputs = kwargs.get("inputs")
    if not isinstance(inputs, dict):
        raise InvalidInput(
            "expected the keyword argument `inputs`, a mapping of named inputs", "inputs"
        )
    outputs = kwargs.get("outputs")
    if outputs is not None:
        package.signature.check_outputs(outputs)
    arrays = package.signature.parse(inputs, _UNBOUNDED)
    return Member(
        request=request,
        package=package,
        inputs=arrays,
        rows=count_rows(arrays) if package.signature.batched else 1,
        outputs=outputs,
        codec=kwargs.get("codec") or package.manifest.codecs.default,
        priority=from_redis(request.delivery_info.get("priority")),
        accepted_at=float(kwargs.get("accepted_at") or received_at),
        received_at=received_at,
    )


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the forward pass did not start within timeout_ms", "timeout_ms")
