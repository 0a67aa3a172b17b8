"""A conversation on a WebSocket: what its client asks for, and the tasks that it awaits.

Messages are handled on the greenlet of the socket; each submit runs on a thread of its own, and
outcomes arrive on the thread of the bridge.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from inferno.errors import (
    BrokerUnavailable,
    InfernoError,
    InvalidField,
    InvalidRequest,
    TaskNotFound,
)
from inferno.protocol.decoding import decode
from inferno.protocol.requests import convert_submit
from inferno.protocol.tasks import TaskState
from tasks.control.tasks import Control
from tasks.gateway import Gateway
from tasks.intake.submit import new_task_id
from tasks.results.bridge import Subscription
from tasks.results.views import TaskView
from tasks.state.outcomes import Outcome
from tasks.state.records import Records
from web.calls import documents, turns
from web.calls.errors import UNEXPECTED
from web.calls.idempotency import from_field
from web.sockets.peer import Peer

#: Largest result that is kept while it waits to be sent, in bytes; larger ones are fetched again.
SMALL_BYTES = 16_384
#: Number of submits of one socket that may run at the same time.
SUBMITTING = 32
#: Number of tasks that are looked up or cancelled in one round trip.
SLICE = Control.CHUNK
#: Longest reference of a client in bytes of JSON: it is kept and sent back.
REFERENCE_BYTES = 256
#: Longest task id; those of the platform have 36 characters.
TASK_ID_CHARACTERS = 255

log = logging.getLogger(__name__)

_TaskId = Annotated[str, msgspec.Meta(max_length=TASK_ID_CHARACTERS)]


class _TaskIds(msgspec.Struct, forbid_unknown_fields=True):
    """The members of `subscribe`, `unsubscribe` and `cancel`."""

    task_id: _TaskId | None = None
    task_ids: list[_TaskId] = []

    def all(self) -> list[str]:
        """Return the ids, each once."""
        first = [] if self.task_id is None else [self.task_id]
        return list(dict.fromkeys([*first, *self.task_ids]))


class _Submitting:
    """The submits of a socket that run: few, and with few bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = self._count = 0
        self._changed = threading.Condition()

    def begin(self, size: int) -> None:
        """Wait for room for one more; one always fits."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    not self._count
                    or (self._count < SUBMITTING and self._bytes + size <= self._most_bytes)
                )
            )
            self._count += 1
            self._bytes += size

    def end(self, size: int) -> None:
        """Make room for others."""
        with self._changed:
            self._count -= 1
            self._bytes -= size
            self._changed.notify()


class Conversation:
    """One multiplexed socket: what its client asks for, and the tasks that it awaits."""

    def __init__(self, gateway: Gateway, peer: Peer) -> None:
        """Begin a conversation that awaits nothing.

        Args:
          gateway: submits and finds tasks.
          peer: the client.
        """
        limits = gateway.settings.websocket
        self._gateway = gateway
        self._peer = peer
        self._most = limits.max_subscriptions
        self._submitting = _Submitting(limits.max_queued_bytes)
        self._lock = threading.Lock()
        self._ended = False
        self._awaited: dict[str, Subscription] = {}
        #: Tasks whose `accepted` is not sent yet, with the outcome if it has come first.
        self._unsaid: dict[str, Outcome | None] = {}
        #: The tasks that were delivered last, so that none is delivered twice.
        self._delivered: dict[str, None] = {}

    def handle(self, text: bytes | bytearray) -> None:
        """Do what a message asks for; a bad message is answered with an error."""
        reference = None
        try:
            turns.give_way(len(text))
            message = decode(text, dict[str, Any], self._gateway.limits)
            reference = _reference(message)
            kind = message.pop("type", None)
            handler = _HANDLERS.get(kind) if isinstance(kind, str) else None
            if handler is None:
                known = ", ".join(_HANDLERS)
                raise InvalidField(f"expected one of {known}, got {kind!r:.80}", "type")
            handler(self, reference, message)
        except InfernoError as exc:
            self._say(reference, {"type": "error", "data": exc.problem()})

    def end(self) -> None:
        """Stop waiting for tasks."""
        with self._lock:
            self._ended = True
            subscriptions = list(self._awaited.values())
            self._awaited.clear()
        for subscription in subscriptions:
            subscription.close()

    def _submit(self, reference: Any, message: dict[str, Any]) -> None:
        # In parallel: one after the other, a burst would trickle into its lane in small batches.
        size = self._peer.keep()
        self._submitting.begin(size)
        arguments = (reference, message, size)
        threading.Thread(target=self._submit_one, args=arguments, daemon=True).start()

    def _submit_one(self, reference: Any, message: dict[str, Any], size: int) -> None:
        task_id = new_task_id()
        accepted = False
        try:
            self._expect(task_id)
            key = message.pop("idempotency_key", None)
            text = b"" if key is None else msgspec.json.encode(message, order="sorted")
            idempotency = from_field(key, "submit", text)
            task = self._gateway.submit(convert_submit(message), idempotency, task_id)
            answer = {"type": "accepted", "data": documents.accepted(task, message)}
            if task.replayed:
                self._say(reference, answer | {"replayed": True})
                self._join([task.task_id])
            else:
                self._say(reference, answer)
                accepted = True
                if task.outcome is not None:
                    # A task that is over at once is not announced.
                    self._arrived(task.outcome)
        except InfernoError as exc:
            self._say(reference, {"type": "error", "data": exc.problem()})
        except Exception:
            log.exception("A submit failed")
            self._say(reference, {"type": "error", "data": UNEXPECTED.problem()})
        finally:
            self._said(task_id, accepted)
            self._peer.release(size)
            self._submitting.end(size)

    def _expect(self, task_id: str) -> None:
        """Await a task that is about to be submitted; its outcome is held back until `_said` runs.

        Raises:
          InvalidRequest: the socket awaits too many tasks.
        """
        self._check_room()
        with self._lock:
            if not self._ended:
                self._unsaid[task_id] = None
                self._awaited[task_id] = self._gateway.bridge.expect(task_id, self._arrived)

    def _said(self, task_id: str, accepted: bool) -> None:
        """Deliver an outcome that came before its `accepted`; stop waiting if there was none."""
        with self._lock:
            outcome = self._unsaid.pop(task_id, None)
            subscription = None if accepted else self._awaited.pop(task_id, None)
        if subscription is not None:
            subscription.close()
        elif outcome is not None:
            self._arrived(outcome)

    def _subscribe(self, _: Any, message: dict[str, Any]) -> None:
        for part in self._slices(message):
            fresh = [one for one in part if not self._knows(one)]
            self._check_room(len(fresh))
            self._join(fresh)

    def _join(self, task_ids: Sequence[str]) -> None:
        """Deliver the outcomes of tasks, now or when they end."""
        try:
            found = self._gateway.records_of(task_ids)
            over = [
                task_id
                for task_id, record in zip(task_ids, found, strict=True)
                if record is None or record.state.terminal
            ]
            sizes = dict(zip(over, self._gateway.records.result_bytes(over), strict=True))
        except BrokerUnavailable as exc:
            for task_id in task_ids:
                self._peer.put(error_envelope(task_id, exc))
            return
        for task_id, record in zip(task_ids, found, strict=True):
            if task_id not in sizes:
                self._wait_for(task_id, None if record is None else record.deadline)
            elif record is not None or sizes[task_id]:
                self._send_outcome(task_id, sizes[task_id])
            else:
                self._peer.put(
                    error_envelope(task_id, TaskNotFound(f"no task has the id {task_id!r}"))
                )

    def _send_outcome(self, task_id: str, size: int) -> None:
        """Deliver the outcome of a task that was over before anyone waited for it."""
        with self._lock:
            # A task that is awaited already is delivered by the bridge.
            if self._knows(task_id):
                return
            self._remember(task_id)
        self._peer.offer(self._deliver, Arrival(task_id, None, size), size)

    def _unsubscribe(self, _: Any, message: dict[str, Any]) -> None:
        for part in self._slices(message):
            for task_id in part:
                with self._lock:
                    subscription = self._awaited.pop(task_id, None)
                if subscription is not None:
                    subscription.close()

    def _cancel(self, reference: Any, message: dict[str, Any]) -> None:
        for part in self._slices(message):
            refusals: Sequence[InfernoError | None]
            try:
                refusals = self._gateway.control.cancel_all(part)
            except BrokerUnavailable as exc:
                refusals = [exc] * len(part)
            for task_id, refused in zip(part, refusals, strict=True):
                if refused is None:
                    self._say(reference, {"type": "cancelled", "task_id": task_id})
                else:
                    # Without `task_id` at the top, as this is not the task's outcome.
                    problem = {**refused.problem(), "task_id": task_id}
                    self._say(reference, {"type": "error", "data": problem})

    def _slices(self, message: dict[str, Any]) -> Iterator[list[str]]:
        """Yield the task ids of a message in slices, for as long as the client is there.

        Raises:
          InvalidField: the message does not name task ids, or too many.
        """
        task_ids = _task_ids(message)
        if len(task_ids) > self._most:
            raise InvalidField(
                f"expected at most {self._most} task ids, got {len(task_ids)}", "task_ids"
            )
        for start in range(0, len(task_ids), SLICE):
            if self._peer.closed:
                return
            yield task_ids[start : start + SLICE]
            # Other clients' turn, also where nothing of the slice took time.
            turns.pause()

    def _ping(self, reference: Any, _: dict[str, Any]) -> None:
        self._say(reference, {"type": "pong"})

    def _check_room(self, more: int = 1) -> None:
        if len(self._awaited) + more > self._most:
            raise InvalidRequest(f"one socket can wait for at most {self._most} tasks")

    def _wait_for(self, task_id: str, deadline: float | None) -> None:
        # The lock keeps `_arrived` from running before the subscription is stored, and it keeps a
        # client that subscribes to its own new task from getting the outcome twice.
        with self._lock:
            if not self._ended and not self._knows(task_id):
                self._awaited[task_id] = self._gateway.bridge.subscribe(task_id, self._arrived)
                self._gateway.deadlines.watch(task_id, deadline)

    def _arrived(self, outcome: Outcome) -> None:
        task_id = outcome.task_id
        with self._lock:
            if task_id in self._unsaid:
                self._unsaid[task_id] = outcome
                return
            subscription = self._awaited.pop(task_id, None)
            if subscription is None:
                return
            self._remember(task_id)
        subscription.close()
        arrival = Arrival.of(outcome)
        self._peer.push(self._deliver, arrival, arrival.held, arrival.loaded)

    def _deliver(self, arrivals: Sequence[Arrival]) -> Iterator[bytes | None]:
        left = [arrival.task_id for arrival in arrivals]
        try:
            for text in envelopes(self._gateway.records, arrivals):
                del left[0]
                yield text
        except BrokerUnavailable:
            # The bridge delivers them again once it has reconnected.
            for task_id in left:
                with self._lock:
                    self._delivered.pop(task_id, None)
                self._wait_for(task_id, None)
                yield None

    def _knows(self, task_id: str) -> bool:
        """Return whether a task's outcome was delivered, or will be."""
        return task_id in self._awaited or task_id in self._delivered

    def _remember(self, task_id: str) -> None:
        self._delivered[task_id] = None
        if len(self._delivered) > self._most:
            del self._delivered[next(iter(self._delivered))]

    def _say(self, reference: Any, message: dict[str, Any]) -> None:
        if reference is not None:
            message["id"] = reference
        self._peer.put(documents.encode(message))


_HANDLERS: dict[str, Callable[[Conversation, Any, dict[str, Any]], None]] = {
    "submit": Conversation._submit,
    "subscribe": Conversation._subscribe,
    "unsubscribe": Conversation._unsubscribe,
    "cancel": Conversation._cancel,
    "ping": Conversation._ping,
}


class Arrival(NamedTuple):
    """A task that is over."""

    task_id: str
    #: None for a large outcome, so that the queue of messages stays small.
    outcome: Outcome | None
    #: Bytes of its result.
    size: int

    @classmethod
    def of(cls, outcome: Outcome) -> Arrival:
        """Keep an outcome, or only its task's id if it is large."""
        size = memoryview(outcome.result).nbytes
        return cls(outcome.task_id, outcome if size <= SMALL_BYTES else None, size)

    @property
    def held(self) -> int:
        """Bytes that it holds while it waits to be sent."""
        return 0 if self.outcome is None else self.size

    @property
    def loaded(self) -> int:
        """Further bytes that it holds while it is being sent."""
        return self.size if self.outcome is None else 0


def envelopes(records: Records, arrivals: Sequence[Arrival]) -> Iterator[bytes]:
    """Yield the messages of tasks that are over.

    Their records are read in one round trip, and each large result when its message is sent.

    Raises:
      BrokerUnavailable: Redis does not answer.
    """
    found = records.records([arrival.task_id for arrival in arrivals])
    for (task_id, outcome, _), record in zip(arrivals, found, strict=True):
        if outcome is None:
            record, outcome = records.fetch(task_id)
        try:
            yield envelope(documents.task(task_id, record, outcome))
        except InfernoError as exc:
            yield error_envelope(task_id, exc)


def envelope(document: TaskView) -> bytes:
    """Return the message of a task that is over."""
    kind = "result" if document["status"] == TaskState.SUCCEEDED else "error"
    return documents.encode({"type": kind, "task_id": document["task_id"], "data": document})


def error_envelope(task_id: str, error: InfernoError) -> bytes:
    """Return the message of a task whose outcome cannot be shown."""
    return documents.encode({"type": "error", "task_id": task_id, "data": error.problem()})


def _reference(message: dict[str, Any]) -> Any:
    """Take the client's reference out of a message.

    Raises:
      InvalidField: it is too long.
    """
    reference = message.pop("id", None)
    if reference is None or isinstance(reference, (bool, int, float)):
        return reference
    # A long text is not written to find that it is too long.
    long_text = isinstance(reference, str) and len(reference) > REFERENCE_BYTES
    size = len(reference) if long_text else len(msgspec.json.encode(reference))
    if size > REFERENCE_BYTES:
        raise InvalidField(f"expected at most {REFERENCE_BYTES} bytes of JSON, got {size}", "id")
    return reference


def _task_ids(message: dict[str, Any]) -> list[str]:
    try:
        return msgspec.convert(message, _TaskIds).all()
    except msgspec.ValidationError as exc:
        raise InvalidField(f"expected task_id or task_ids: {exc}") from None
