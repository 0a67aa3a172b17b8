"""The batch-aware consumer of one lane: a `celery_batches.Batches` task that is safe.

    message -> Member -> BatchFormer -> thread (begin, infer, settle) -> acknowledge

A batch occupies an executor for its forward pass only. The one before it is settled, and the one
after it may begin, meanwhile, so that Redis' time is not the model's.

celery-batches supplies the task type that consumes messages in groups; what it lacks (it drops
batches that raise, cuts batches by a free-running timer, and tells Celery nothing) is replaced
here. Everything in this module runs on the worker's event loop, so that it needs no locks; only
`_work` runs in a thread of the pool.
"""

from __future__ import annotations

import logging
import math
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import msgspec
import redis
from celery import Celery
from celery.platforms import EX_FAILURE
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.request import Request, create_request_cls
from celery_batches import Batches
from kombu.asynchronous.timer import Entry

from inferno import names
from inferno.batching.former import BatchFormer, Flush, FlushReason, Waiting, batch_key
from inferno.batching.pace import Pace
from inferno.engine.collation import count_rows
from inferno.engine.cores import Cores
from inferno.engine.engine import Engine
from inferno.errors import (
    DeadlineExceeded,
    InfernoError,
    InvalidInput,
    ModelNotFound,
    NotLoaded,
    PackageError,
    TaskCancelled,
)
from inferno.protocol.tasks import TaskState
from inferno.repository.repository import Model, Package
from inferno.settings import EventSettings
from tasks.broker.connection import UNAVAILABLE
from tasks.broker.lanes import Held, Lanes
from tasks.state import claims
from tasks.state.transitions import Begun, Verdict
from tasks.transport import Message
from workers.batches.celery_events import Events
from workers.batches.celery_request import Delivery
from workers.batches.forward import (
    Answer,
    Batch,
    Coordinator,
    Member,
    Watch,
    Webhook,
    answer,
    prepare,
    unanswered,
)
from workers.batches.settle import UNBOUNDED, Settled, Settler
from workers.batches.turns import Line

logger = logging.getLogger(__name__)

#: So long before the end of the pass before its own, in seconds, a full batch may begin: its first
#: steps take their time in Redis, and the executor shall not wait for them. The batch would not get
#: any better by waiting, but could no longer be cancelled or overtaken.
AHEAD_S = 0.05

#: What Celery itself would run when a task is over. Refused, because whoever asks for it waits.
_FOLLOWERS = ("callbacks", "errbacks", "chain", "chord")


class InferenceTask(Batches):  # type: ignore[misc]
    """The Celery task `infer.<model>`."""

    acks_late = True
    send_events = True
    ignore_result = False

    def __init__(
        self,
        model: Model,
        engine: Callable[[int], Engine | Coordinator],
        settler: Settler,
        lanes: Lanes,
        *,
        executors: int,
        former: BatchFormer[Member],
        watch: Watch,
        cores: Cores,
        pace: Pace,
        settings: EventSettings,
    ) -> None:
        """Serve one model.

        Args:
          model: whose lane this is.
          engine: gives the loaded engine of a version, or what coordinates it where that is an
            ensemble; it may take long the first time.
          settler: writes outcomes.
          lanes: know what priorities mean to the broker.
          executors: forward passes at the same time.
          former: decides which tasks leave together.
          watch: guards against a model that hangs.
          cores: where it runs.
          pace: measures how fast it is.
          settings: of what is told of its tasks.
        """
        super().__init__()
        self.name = names.task_name(model.name)
        self._model = model
        self._engine = engine
        self._settler = settler
        self._lanes = lanes
        self._executors = executors
        #: The batches that have not had their forward pass yet.
        self._line = Line(executors)
        self._former = former
        self._watch = watch
        self._cores = cores
        self._pace = pace
        self._settings = settings
        self._events: Events = None  # type: ignore[assignment]
        #: All batches that a thread works on.
        self._batches = 0
        #: How long the last pass has taken, in seconds; before the first, it may be long.
        self._pass_s = math.inf
        #: What was handed over in this round of the event loop, and is not looked at yet.
        self._arrived: list[Request] = []
        #: Messages in the batches that run, each with those that the broker handed over again
        #: meanwhile, after a reconnect.
        self._riding: dict[Held, list[Message]] = {}
        self._topping_up = False
        self._consumer: Consumer = None
        self._wake_up: Entry | None = None

    def serve(self, model: Model, max_rows: int) -> None:
        """Go on with other versions of the model.

        Args:
          model: as it is now.
          max_rows: of one forward pass of any of its versions.
        """
        self._model = model
        self._former.max_rows = max_rows

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run outside a worker: a batch needs the engine that only a worker holds."""
        raise NotImplementedError(
            f"{self.name} runs in a worker: celery -A tasks worker -Q {self._model.name}"
        )

    def Strategy(self, task: Batches, app: Celery, consumer: Consumer) -> Callable[..., None]:
        """Return the handler of messages; called again after each reconnect to the broker."""
        # What waited belongs to the old connection, and the broker hands it over again.
        self._former.clear()
        self._arrived.clear()
        self._wake_up = None
        self._consumer = consumer
        self._events = Events(consumer, self._settings)
        make_request = create_request_cls(
            Request, task, consumer.pool, consumer.hostname, consumer.event_dispatcher, app=app
        )

        def handle(
            message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any
        ) -> None:
            if self._rides(message):
                return
            takers = getattr(message.channel, "takers", None)
            if takers is not None:
                # From here on, Celery sees only what is out of the ordinary.
                takers[self._model.name] = self._take
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
            if not self._arrived and not self._topping_up:
                # The messages of one fetch come one by one, and are looked at together.
                consumer.timer.call_after(0, self._take_in)
            self._arrived.append(request)
            for callback in callbacks:
                callback(request)

        return handle

    def _take(self, messages: list[Message]) -> list[Message]:
        """Take ordinary messages of one fetch; return the others, for Celery to make sense of."""
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
        """Return whether a message is in a batch that runs, and has come once more."""
        again = self._riding.get(Held.of(message.delivery_info))
        if again is not None:
            again.append(message)
        return again is not None

    def _take_in(self) -> None:
        """Look at the tasks that have arrived, and let leave what should leave now."""
        self._receive_all()
        self._pump()

    def _receive_all(self) -> None:
        arrived, self._arrived = self._arrived, []
        self._events.received(arrived)
        for request in arrived:
            self._receive(request)

    def _receive(self, request: Request) -> None:
        # Streams keep what is not due yet, by Redis' clock.
        kept = self._lanes.streams or request.eta is None
        delay = 0 if kept else request.eta.timestamp() - time.time()
        if delay > 0:
            # It holds no place in the prefetch count while it waits.
            self._consumer.qos.increment_eventually()
            self._consumer.timer.call_after(delay, self._receive_due, (request,), priority=6)
        else:
            self._admit(request)

    def _receive_due(self, request: Request) -> None:
        self._consumer.qos.decrement_eventually()
        self._admit(request)
        self._pump()

    def _admit(self, request: Request) -> None:
        received_at = time.time()
        package = self._model.newest
        try:
            package = self._package(_arguments(request))
            if request.id in worker_state.revoked:
                raise _revoked()
            member = _member(request, package, received_at, self._lanes)
        except InfernoError as error:
            self._refuse({_stub(request, package, received_at, self._lanes): error})
            return
        except Exception as exc:
            # Any client may have sent it; it must not go from worker to worker.
            logger.exception("task %s cannot be read", request.id)
            odd = InvalidInput(f"the message cannot be read: {type(exc).__name__}: {exc}")
            self._refuse({_stub(request, package, received_at, self._lanes): odd})
            return
        now = time.monotonic()
        deadline = now + request.expires.timestamp() - received_at if request.expires else None
        pad = tuple(package.manifest.batching.pad)
        self._former.add(
            Waiting(
                member,
                batch_key(package.version, member.inputs, pad),
                member.rows,
                now,
                deadline,
                member.priority,
                member.accepted_at,
            )
        )

    def _package(self, kwargs: dict[str, Any]) -> Package:
        version = kwargs.get("version")
        if version is not None and type(version) is not int:
            raise ModelNotFound(
                f"expected the version as a whole number, got {version!r}", "version"
            )
        if version is None:
            return self._model.served(None, random.random())
        return self._model.package(version)

    def _pump(self) -> None:
        """Let leave what should leave now, and see to it that this is asked again in time."""
        if worker_state.should_stop is not None or worker_state.should_terminate is not None:
            # What waits goes back to the lane when the channel closes, and no timer fires any more.
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
        """How many batches could have their passes at once."""
        return max(self._executors - len(self._line), 0)

    def _next_reason(self, now: float) -> FlushReason | None:
        """Say why a batch should begin now, or None when none should."""
        if self._batches >= threads(self._executors):
            return None
        reason = self._former.next_reason(now)
        if self._free:
            return reason
        return reason if reason is FlushReason.FULL and self._ahead_from(now) <= now else None

    def _ahead_from(self, now: float) -> float:
        """Return from when on a full batch may begin although no executor is free."""
        if len(self._line) > self._executors:
            return math.inf  # One has done so already.
        began = self._line.first_began()
        return (now if began is None else began) + self._pass_s - AHEAD_S

    def _top_up(self) -> bool:
        """Fetch once more for a batch that would leave with free seats; say whether any came."""
        # One task alone is the only one of a lone client: nobody else is waiting.
        return len(self._former) > 1 and self._fetch()

    def _fetch(self) -> bool:
        fetch = getattr(self._consumer.task_consumer.channel, "fetch", None)
        if fetch is None:
            return False
        self._topping_up = True
        try:
            return bool(fetch())
        except self._consumer.connection_errors as exc:
            # The event loop finds out by itself, and the transport what was lost with the answer.
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
        batch = _batch(flush.reason, [waiting.task for waiting in flush.members])
        self._events.started([member.request for member in batch.members])
        for member in batch.members:
            if member.held.entry:
                self._riding[member.held] = []
        self._line.join(batch.id)
        self._batches += 1
        self._former.started(len(batch.members))
        self._consumer.pool.apply_async(self._work, (batch,))

    def _work(self, batch: Batch) -> None:
        """Answer and settle a batch, in a thread of the pool."""
        settled: list[Settled] = []
        try:
            settled = self._answer(batch)
        except Exception as exc:
            logger.exception("batch %s of %s could not be settled", batch.id, self.name)
            settled = self._abandon(batch, exc)
        finally:
            self._leave(batch)
            self._consumer.call_soon(self._finish, batch, settled)

    def _leave(self, batch: Batch) -> None:
        """Let the next batch have its pass, while this one is settled."""
        if self._line.leave(batch.id):
            self._consumer.call_soon(self._passed)
            # Last, because this thread may have to wait for another core.
            self._cores.leave()

    def _abandon(self, batch: Batch, cause: Exception) -> list[Settled]:
        """Settle what something unforeseen has happened to; if that fails too, end this worker."""
        if worker_state.should_stop is not None:
            return []  # Given back, for others to run.
        try:
            return self._settler.abandon(batch.members, cause)
        except Exception:
            logger.critical("this worker cannot settle tasks, and ends", exc_info=True)
            worker_state.should_stop = EX_FAILURE
            return []

    def _answer(self, batch: Batch) -> list[Settled]:
        if batch.members[0].package.is_ensemble:
            return self._coordinate(batch)
        begun = self._settler.begin(batch)
        wanted = [member for member, begin in begun.items() if begin.verdict is Verdict.DONE]
        suspects = {m: begin for m, begin in begun.items() if begin.verdict is Verdict.SUSPECT}
        turn = self._line.turn(batch.id)
        settled, answers = self._forward(batch, wanted, turn)
        if not suspects:
            self._leave(batch)
        settled += self._settler.settle(answers)
        for member, last in suspects.items():
            # It begins when nobody else has a pass here, or it would be charged with their ends.
            with self._line.turn(batch.id):
                settled += self._alone(member, last)
        over = begun.keys() - suspects.keys() - set(wanted)
        return settled + [Settled(member, None) for member in over]

    def _coordinate(self, batch: Batch) -> list[Settled]:
        """Have the members of an ensemble answered by its stages, and settle each when it is.

        No code of a model runs here, so that nobody is suspected when this worker ends.
        """
        begun = self._settler.begin(batch, alone=True)
        wanted = [member for member, begin in begun.items() if begin.verdict is Verdict.DONE]
        again = {member.request.id for member, begin in begun.items() if begin.attempts > 1}
        members, settled = self._settler.redeem(wanted)
        settled += [Settled(member, None) for member in begun.keys() - set(wanted)]
        with self._line.turn(batch.id):
            if members:
                for answers in self._answers(batch, members, again):
                    settled += self._settler.settle(answers)
        return settled

    def _answers(
        self, batch: Batch, members: list[Member], again: set[str]
    ) -> Iterator[list[Answer]]:
        try:
            coordinator = self._engine(members[0].package.version)
        except InfernoError as exc:
            logger.error("batch %s: %s", batch.id, exc)
            return iter([unanswered(batch, members, NotLoaded(exc.detail))])
        assert not isinstance(coordinator, Engine)
        return coordinator.answers(batch, members, again)

    def _forward(
        self, batch: Batch, members: list[Member], turn: AbstractContextManager[Any]
    ) -> tuple[list[Settled], list[Answer]]:
        """Give members their forward pass.

        Args:
          batch: that they ride in.
          members: of one version, and marked as running.
          turn: entered for the pass itself.
        Returns:
          what became of those that could not have it, and the answers of the others.
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
        self._pass_s = pass_s
        self._pace.note(len(members), sum(member.rows for member in members), pass_s)
        return lost, answers

    def _alone(self, member: Member, last: Begun) -> list[Settled]:
        """Run a member that was in a forward pass during which its worker ended."""
        if self._settler.exhausted(last):
            return self._settler.bury(member, last)
        batch = _batch(FlushReason.ISOLATED, [member])
        logger.warning(
            "task %s runs alone: its worker ended during batch %s", member.request.id, last.batch_id
        )
        begun = self._settler.begin(batch, alone=True)[member]
        if begun.verdict is not Verdict.DONE:
            return [Settled(member, None)]
        settled, answers = self._forward(batch, [member], nullcontext())
        return settled + self._settler.settle(answers)

    def _passed(self) -> None:
        self._former.freed(time.monotonic())
        self._pump()

    def _finish(self, batch: Batch, settled: list[Settled]) -> None:
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
            # What waits in this lane may have waited for its share of the prefetch count.
            self._fetch()
        self._pump()

    def give_back(self) -> int:
        """Give back what waits in the buffer, for other workers; return how many that were."""
        waiting = self._former.drop(lambda _: True)
        return self._lanes.give_back(self._model.name, [item.task.held for item in waiting])

    def _acknowledge(self, settled: list[Settled]) -> None:
        for item in settled:
            request = item.member.request
            if item.member.held.entry:
                # Done in the same step as it was settled; what is left is to free its place.
                request.acknowledged = True
                request.message.channel.forget(request.message.delivery_tag)
            else:
                request.acknowledge()
        self._events.ended(settled)


def threads(executors: int) -> int:
    """Return how many batches are worked on at the same time.

    Each executor has one in its forward pass and one that is settled; and one is about to begin.
    """
    return 2 * executors + 1


def _batch(reason: FlushReason, members: list[Member]) -> Batch:
    return Batch(uuid.uuid4().hex, reason, members)


def _arguments(request: Request) -> dict[str, Any]:
    try:
        kwargs = request.kwargs
    except Exception as exc:  # Whatever the message's encoding makes of its body.
        raise InvalidInput(f"the message cannot be read: {type(exc).__name__}: {exc}") from exc
    if not isinstance(kwargs, dict):
        raise InvalidInput("expected keyword arguments", "inputs")
    _, _, embedded = request.message.payload
    followers = [name for name in _FOLLOWERS if embedded.get(name)]
    if followers:
        raise InvalidInput(f"nothing can follow the task of a batch: {', '.join(followers)}")
    return kwargs


def _stub(request: Request, package: Package, received_at: float, lanes: Lanes) -> Member:
    """Return a member that is only to be refused, with what can be read of its message."""
    webhook, priority, accepted_at = None, 0, received_at
    with suppress(Exception):
        priority = lanes.from_broker(request.delivery_info.get("priority"))
        accepted_at = _time(request.kwargs.get("accepted_at"), received_at)
        webhook = _webhook(request.kwargs.get("webhook"))
    held = Held.of(request.message.delivery_info)
    return Member(
        request, held, package, {}, 0, None, "json", priority, accepted_at, received_at, webhook
    )


def _member(request: Request, package: Package, received_at: float, lanes: Lanes) -> Member:
    kwargs = request.kwargs
    inputs = kwargs.get("inputs")
    claimed = claims.is_claim(kwargs)
    if not claimed and not isinstance(inputs, dict):
        raise InvalidInput(
            "expected the keyword argument `inputs`, a mapping of named inputs", "inputs"
        )
    outputs = kwargs.get("outputs")
    if outputs is not None:
        package.signature.check_outputs(outputs)
    if claimed:
        arrays = claims.stand_ins(kwargs[claims.ARGUMENT])
    else:
        arrays = package.signature.parse(inputs, UNBOUNDED)
    return Member(
        request=request,
        held=Held.of(request.message.delivery_info),
        package=package,
        inputs=arrays,
        rows=count_rows(arrays) if package.signature.batched else 1,
        outputs=outputs,
        codec=kwargs.get("codec") or package.manifest.codecs.default,
        priority=lanes.from_broker(request.delivery_info.get("priority")),
        accepted_at=_time(kwargs.get("accepted_at"), received_at),
        received_at=received_at,
        webhook=_webhook(kwargs.get("webhook")),
        claimed=claimed,
    )


def _time(given: Any, default: float) -> float:
    """Return a time that a client may have sent, if it is one."""
    if type(given) is float and 0 < given < math.inf:
        return given
    is_time = isinstance(given, int | float) and math.isfinite(given) and given > 0
    return float(given) if is_time else default


def _webhook(given: Any) -> Webhook | None:
    if given is None:
        return None
    try:
        return msgspec.convert(given, Webhook | None)
    except msgspec.ValidationError as exc:
        raise InvalidInput(f"{exc}: expected a URL and events", "webhook") from None


def _revoked() -> TaskCancelled:
    return TaskCancelled("it was revoked by Celery's remote control")


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the forward pass did not start within timeout_ms", "timeout_ms")
