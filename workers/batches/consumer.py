"""Batch step: the batch-aware consumer of one lane, on the worker's event loop.

    message -> Member -> BatchFormer -> thread of the pool (Execution) -> acknowledge

celery-batches supplies the task type that consumes messages in groups. Its unsafe parts are
replaced here: it drops batches that raise, cuts batches by a free-running timer, and reports
nothing to Celery. Everything here runs on the event loop and needs no locks, except `_work`.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.request import Request, create_request_cls
from celery_batches import Batches
from kombu.asynchronous.timer import Entry

from inferno import names
from inferno.batching.former import BatchFormer, Flush, FlushReason, WaitingTask, batch_key
from inferno.errors import DeadlineExceeded, InfernoError, InvalidInput, TaskCancelled
from inferno.protocol.limits import Limits
from inferno.protocol.tasks import TaskState
from inferno.repository.package import Package
from inferno.repository.repository import Model
from inferno.settings import EventSettings
from tasks.broker.connection import UNAVAILABLE
from tasks.broker.lanes import Held, Lanes
from tasks.transport import Message
from workers.batches.celery_events import Events
from workers.batches.celery_request import Delivery
from workers.batches.execution import Execution, new_batch, threads
from workers.batches.member import (
    Batch,
    Member,
    read_arguments,
    read_member,
    read_stub,
    read_version,
)
from workers.batches.settle import Settler
from workers.batches.settlement import Settled
from workers.batches.turns import Turns

logger = logging.getLogger(__name__)

#: How long before the end of the running pass a full batch may begin, in seconds. Its first steps
#: take time in Redis, which the executor should not wait for. Such a batch gains nothing by
#: waiting, but it can no longer be cancelled or overtaken.
AHEAD_S = 0.05


class InferenceTask(Batches):  # type: ignore[misc]
    """The Celery task `infer.<model>`."""

    acks_late = True
    send_events = True
    ignore_result = False

    def __init__(
        self,
        model: Model,
        lanes: Lanes,
        settler: Settler,
        execution: Execution,
        *,
        executors: int,
        turns: Turns,
        former: BatchFormer[Member],
        limits: Limits,
        settings: EventSettings,
    ) -> None:
        """Serve one model.

        Args:
          model: the model of this lane.
          lanes: translate the broker's priorities.
          settler: refuses tasks.
          execution: answers and settles batches.
          executors: forward passes at the same time.
          turns: order of the forward passes, shared with `execution`.
          former: decides which tasks leave together.
          limits: largest sizes of inputs.
          settings: which events Celery is sent.
        """
        super().__init__()
        self.name = names.task_name(model.name)
        self._model = model
        self._lanes = lanes
        self._settler = settler
        self._execution = execution
        self._executors = executors
        self._turns = turns
        self._former = former
        self._limits = limits
        self._settings = settings
        self._events: Events = None  # type: ignore[assignment]
        #: Number of batches in threads.
        self._batches = 0
        #: Requests of this round of the event loop that are not admitted yet.
        self._arrived: list[Request] = []
        #: Messages of running batches. For each, the copies that the broker delivered again
        #: meanwhile, after a reconnect.
        self._riding: dict[Held, list[Message]] = {}
        self._topping_up = False
        self._consumer: Consumer = None
        self._wake_up: Entry | None = None

    def serve(self, model: Model, max_rows: int) -> None:
        """Continue with other versions of the model.

        Args:
          model: the model as it is now.
          max_rows: most rows of one forward pass of any version.
        """
        self._model = model
        self._former.max_rows = max_rows

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run outside a worker: a batch needs the engine that only a worker holds."""
        raise NotImplementedError(
            f"{self.name} runs in a worker: celery -A tasks worker -Q {self._model.name}"
        )

    # Arrival: from a message to the former

    def Strategy(self, task: Batches, app: Celery, consumer: Consumer) -> Callable[..., None]:
        """Return the handler of messages; called again after each reconnect to the broker."""
        # The broker delivers again what waited on the old connection.
        self._former.clear()
        self._arrived.clear()
        self._wake_up = None
        self._consumer = consumer
        self._events = Events(consumer, self._settings)
        make_request = _request_factory(task, app, consumer)

        def handle(
            message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any
        ) -> None:
            if self._rides(message):
                return
            takers = getattr(message.channel, "takers", None)
            if takers is not None:
                # From here on, ordinary messages bypass Celery.
                takers[self._model.name] = self._take
            request = make_request(message)
            if not self._arrived and not self._topping_up:
                # Messages of one fetch come one by one, and are admitted together.
                consumer.timer.call_after(0, self._take_in)
            self._arrived.append(request)
            for callback in callbacks:
                callback(request)

        return handle

    def _take(self, messages: list[Message]) -> list[Message]:
        """Take the ordinary messages of one fetch; return the others for Celery."""
        others = []
        for message in messages:
            if self._rides(message):
                continue
            if (delivery := Delivery.read(message, self, self._consumer)) is not None:
                self._arrived.append(delivery)
            else:
                others.append(message)
        if self._arrived and not self._topping_up:
            self._take_in()
        return others

    def _rides(self, message: Message) -> bool:
        """Return whether a message belongs to a running batch, and was delivered again."""
        again = self._riding.get(Held.of(message.delivery_info))
        if again is not None:
            again.append(message)
        return again is not None

    def _take_in(self) -> None:
        """Admit the tasks that have arrived, and start the batches that should leave now."""
        self._receive_all()
        self._pump()

    def _receive_all(self) -> None:
        arrived, self._arrived = self._arrived, []
        self._events.received(arrived)
        for request in arrived:
            self._receive(request)

    def _receive(self, request: Request) -> None:
        # Streams themselves hold back tasks that are not due, by Redis' clock.
        due = self._lanes.streams or request.eta is None
        delay = 0 if due else request.eta.timestamp() - time.time()
        if delay > 0:
            # A task that is not due does not count as prefetched.
            self._consumer.qos.increment_eventually()
            self._consumer.timer.call_after(delay, self._receive_due, (request,), priority=6)
        else:
            self._admit(request)

    def _receive_due(self, request: Request) -> None:
        self._consumer.qos.decrement_eventually()
        self._admit(request)
        self._pump()

    def _admit(self, request: Request) -> None:
        """Put a task into the former, or refuse it."""
        received_at = time.time()
        package = self._model.newest
        try:
            package = self._package(read_version(read_arguments(request)))
            if request.id in worker_state.revoked:
                raise _revoked()
            member = read_member(request, package, received_at, self._lanes, self._limits)
        except InfernoError as error:
            self._refuse({read_stub(request, package, received_at, self._lanes): error})
            return
        except Exception as exc:
            # Any client may have sent it. Without an outcome it would go from worker to worker.
            logger.exception("task %s cannot be read", request.id)
            odd = InvalidInput(f"the message cannot be read: {type(exc).__name__}: {exc}")
            self._refuse({read_stub(request, package, received_at, self._lanes): odd})
            return
        now = time.monotonic()
        deadline = now + request.expires.timestamp() - received_at if request.expires else None
        pad = tuple(package.manifest.batching.pad)
        self._former.add(
            WaitingTask(
                member,
                batch_key(package.version, member.inputs, pad),
                member.rows,
                now,
                deadline,
                member.priority,
                member.accepted_at,
            )
        )

    def _package(self, version: int | None) -> Package:
        if version is None:
            return self._model.served(None, random.random())
        return self._model.package(version)

    # Departure: from the former to a thread

    def _pump(self) -> None:
        """Start the batches that should leave now, and set the timer for the next ones."""
        if worker_state.should_stop is not None or worker_state.should_terminate is not None:
            # Waiting tasks return to the lane when the channel closes. No timer fires any more.
            self._events.flush()
            return
        if self._topping_up:
            return
        try:
            self._flush()
        finally:
            self._set_wake_up()

    def _flush(self) -> None:
        now = time.monotonic()
        self._expire(now)
        self._drop_revoked()
        while (reason := self._next_reason(now)) is not None:
            if reason is not FlushReason.FULL and self._top_up():
                now = time.monotonic()
            flush = self._former.flush(now, free=self._free)
            if flush is not None:
                self._start(flush)

    @property
    def _free(self) -> int:
        """Number of executors without a batch."""
        return max(self._executors - len(self._turns), 0)

    def _next_reason(self, now: float) -> FlushReason | None:
        """Return why a batch should begin now, or None if none should."""
        if self._batches >= threads(self._executors):
            return None
        reason = self._former.next_reason(now)
        if self._free:
            return reason
        return reason if reason is FlushReason.FULL and self._ahead_from(now) <= now else None

    def _ahead_from(self, now: float) -> float:
        """Return the time from which a full batch may begin although no executor is free."""
        if len(self._turns) > self._executors:
            return math.inf  # Another one is ahead already.
        start = self._turns.oldest_start()
        return (now if start is None else start) + self._execution.pass_s - AHEAD_S

    def _top_up(self) -> bool:
        """Fetch once more for a batch that would leave with free seats; return whether any came."""
        # A single task is that of a lone client, so no other task is in the lane.
        return len(self._former) > 1 and self._fetch()

    def _fetch(self) -> bool:
        fetch = getattr(self._consumer.task_consumer.channel, "fetch", None)
        if fetch is None:
            return False
        self._topping_up = True
        try:
            return bool(fetch())
        except self._consumer.connection_errors as exc:
            # The event loop notices the lost connection, and the transport the lost answer.
            logger.warning("no more tasks can be fetched for now: %s", exc)
            return False
        finally:
            self._topping_up = False
            self._receive_all()

    def _set_wake_up(self) -> None:
        if self._wake_up is not None:
            self._wake_up.cancel()
            self._wake_up = None
        now = time.monotonic()
        dues = [self._former.next_deadline()]
        if self._batches < threads(self._executors):
            if self._free:
                dues.append(self._former.next_due())
            elif self._former.next_reason(now) is FlushReason.FULL:
                dues.append(self._ahead_from(now))
        due = min((due for due in dues if due is not None), default=math.inf)
        if due < math.inf:
            delay = max(due - now, 0)
            self._wake_up = self._consumer.timer.call_after(delay, self._pump)

    def _expire(self, now: float) -> None:
        deadline = self._former.next_deadline()
        if deadline is not None and deadline <= now:
            late = self._former.drop(lambda w: w.deadline is not None and w.deadline <= now)
            self._refuse({waiting.task: _too_late() for waiting in late})

    def _drop_revoked(self) -> None:
        if worker_state.revoked:
            revoked = self._former.drop(lambda w: w.task.request.id in worker_state.revoked)
            self._refuse({waiting.task: _revoked() for waiting in revoked})

    def _refuse(self, errors: dict[Member, InfernoError]) -> None:
        try:
            settled = self._settler.refuse(errors)
        except (*UNAVAILABLE, redis.ResponseError) as exc:
            logger.warning("%d tasks could not be settled: %s; trying again", len(errors), exc)
            self._consumer.timer.call_after(Settler.RETRY_S, self._refuse, (errors,))
            return
        self._acknowledge(settled)

    def _start(self, flush: Flush[Member]) -> None:
        batch = new_batch(flush.reason, [waiting.task for waiting in flush.members])
        self._events.started([member.request for member in batch.members])
        for member in batch.members:
            if member.held.entry:
                self._riding[member.held] = []
        self._turns.join(batch.id)
        self._batches += 1
        self._former.started(len(batch.members))
        self._consumer.pool.apply_async(self._work, (batch,))

    def _work(self, batch: Batch) -> None:
        """Answer and settle a batch. Runs in a thread of the pool; reports to the event loop."""
        settled: list[Settled] = []
        try:
            settled = self._execution.run(batch, lambda: self._consumer.call_soon(self._passed))
        finally:
            self._consumer.call_soon(self._finish, batch, settled)

    # Return: from a thread to the broker

    def _passed(self) -> None:
        """Use the executor that a batch has left."""
        self._former.freed(time.monotonic())
        self._pump()

    def _finish(self, batch: Batch, settled: list[Settled]) -> None:
        """Acknowledge a batch that is settled."""
        self._batches -= 1
        self._former.finished(len(batch.members), time.monotonic())
        again = [m for member in batch.members for m in self._riding.pop(member.held, ())]
        self._acknowledge(settled)
        ended_at = time.time()
        for item in settled:
            if item.state is TaskState.SUCCEEDED:
                self._former.answered(ended_at - item.member.accepted_at)
        for message in again if settled else ():
            message.channel.forget(message.delivery_tag)
        if len(self._consumer.task_consumer.queues) > 1:
            # Other lanes may have used up the prefetch count that tasks of this lane waited for.
            self._fetch()
        self._pump()

    def give_back(self) -> int:
        """Return the waiting tasks to the lane, for other workers; return their number."""
        waiting = self._former.drop(lambda _: True)
        return self._lanes.give_back(self._model.name, [item.task.held for item in waiting])

    def _acknowledge(self, settled: list[Settled]) -> None:
        for item in settled:
            request = item.member.request
            if item.member.held.entry:
                # Settling has acknowledged it in Redis; this frees its place in the prefetch count.
                request.acknowledged = True
                request.message.channel.forget(request.message.delivery_tag)
            else:
                request.acknowledge()
        self._events.ended(settled)


def _request_factory(task: Batches, app: Celery, consumer: Consumer) -> Callable[[Any], Request]:
    """Return a function that makes Celery's own request of a message."""
    make_request = create_request_cls(
        Request, task, consumer.pool, consumer.hostname, consumer.event_dispatcher, app=app
    )
    # Celery's own `ack` waits for the next round of the event loop, which may be up to a second
    # later. Requests are acknowledged on the loop, so they do it directly.
    return lambda message: make_request(
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


def _revoked() -> TaskCancelled:
    return TaskCancelled("it was revoked by Celery's remote control")


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the forward pass did not start within timeout_ms", "timeout_ms")
