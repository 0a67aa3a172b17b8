"""A conversation on a WebSocket: what its client asks for, and the tasks that it awaits.

Messages are handled on the greenlet of the socket; each submit runs on a thread of its own, and
outcomes arrive on the thread of the bridge.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from inferno.errors import BrokerUnavailable, InfernoError, InvalidField, InvalidRequest
from inferno.protocol.decoding import decode
from inferno.protocol.requests import convert_submit
from inferno.protocol.tasks import TaskState
from tasks.gateway import Gateway
from tasks.intake.submit import new_task_id
from tasks.results.bridge import Subscription
from tasks.results.views import TaskView
from tasks.state.outcomes import Outcome
from tasks.state.records import Records
from web.calls import documents
from web.calls.errors import UNEXPECTED
from web.calls.idempotency import from_field
from web.sockets.peer import Peer

#: Largest result that is kept while it waits to be sent, in bytes; larger ones are fetched again.
SMALL_BYTES = 16_384
#: Number of submits of one socket that may run at the same time.
SUBMITTING = 32

log = logging.getLogger(__name__)


class _TaskIds(msgspec.Struct, forbid_unknown_fields=True):
    """The members of `subscribe`, `unsubscribe` and `cancel`."""

    task_id: str | None = None
    task_ids: list[str] = []

    def all(self) -> list[str]:
        return self.task_ids if self.task_id is None else [self.task_id, *self.task_ids]


class Conversation:
    """One multiplexed socket: what its client asks for, and the tasks that it awaits."""

    def __init__(self, gateway: Gateway, peer: Peer, most: int) -> None:
        """Begin a conversation that awaits nothing.

        Args:
          gateway: submits and finds tasks.
          peer: the client.
          most: number of tasks that the socket may await at the same time.
        """
        self._gateway = gateway
        self._peer = peer
        self._most = most
        self._submitting = threading.BoundedSemaphore(SUBMITTING)
        self._lock = threading.Lock()
        self._ended = False
        self._awaited: dict[str, Subscription] = {}
        #: Tasks whose `accepted` is not sent yet, with the outcome if it has come first.
        self._unsaid: dict[str, Outcome | None] = {}
        #: The tasks that were delivered last, so that none is delivered twice.
        self._delivered: dict[str, None] = {}
        self._handlers: dict[str, Callable[[Any, dict[str, Any]], None]] = {
            "submit": self._submit,
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
            "cancel": self._cancel,
            "ping": self._ping,
        }

    def handle(self, text: str | bytes) -> None:
        """Do what a message asks for; a bad message is answered with an error."""
        reference = None
        try:
            message = decode(text, dict[str, Any], self._gateway.limits)
            reference = message.pop("id", None)
            kind = message.pop("type", None)
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                known = ", ".join(self._handlers)
                raise InvalidField(f"expected one of {known}, got {kind!r:.80}", "type")
            handler(reference, message)
        except InfernoError as exc:
            self._say(reference, {"type": "error", "data": exc.problem()})

    def end(self) -> None:
        """Stop waiting for tasks."""
        with self._lock:
            self._ended = True
            subscriptions = list(self._awaited.values())
        for subscription in subscriptions:
            subscription.close()

    def _submit(self, reference: Any, message: dict[str, Any]) -> None:
        # In parallel: one after the other, a burst would trickle into its lane in small batches.
        self._submitting.acquire()
        run = threading.Thread(target=self._submit_one, args=(reference, message), daemon=True)
        run.start()

    def _submit_one(self, reference: Any, message: dict[str, Any]) -> None:
        task_id = new_task_id()
        accepted = False
        try:
            self._expect(task_id)
            key = message.pop("idempotency_key", None)
            text = msgspec.json.encode(message, order="sorted")
            idempotency = from_field(key, "submit", text)
            task = self._gateway.submit(convert_submit(message), idempotency, task_id)
            answer = {"type": "accepted", "data": documents.accepted(task, message)}
            if task.replayed:
                self._say(reference, answer | {"replayed": True})
                self._join(task.task_id)
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
            self._submitting.release()

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
        for task_id in _task_ids(message):
            if task_id not in self._awaited and task_id not in self._delivered:
                self._check_room()
                self._join(task_id)

    def _join(self, task_id: str) -> None:
        try:
            record, outcome = self._gateway.fetch(task_id)
            document = documents.task(task_id, record, outcome)
        except InfernoError as exc:
            self._peer.put(error_envelope(task_id, exc))
            return
        if TaskState(document["status"]).terminal:
            with self._lock:
                # A task that is awaited already is delivered by the bridge.
                if task_id in self._delivered or task_id in self._awaited:
                    return
                self._remember(task_id)
            self._peer.put(envelope(document))
        else:
            self._wait_for(task_id, None if record is None else record.deadline)

    def _unsubscribe(self, _: Any, message: dict[str, Any]) -> None:
        for task_id in _task_ids(message):
            with self._lock:
                subscription = self._awaited.pop(task_id, None)
            if subscription is not None:
                subscription.close()

    def _cancel(self, reference: Any, message: dict[str, Any]) -> None:
        for task_id in _task_ids(message):
            try:
                self._gateway.control.cancel(task_id)
            except InfernoError as exc:
                # Without `task_id` at the top, as this is not the task's outcome.
                problem = {**exc.problem(), "task_id": task_id}
                self._say(reference, {"type": "error", "data": problem})
            else:
                self._say(reference, {"type": "cancelled", "task_id": task_id})

    def _ping(self, reference: Any, _: dict[str, Any]) -> None:
        self._say(reference, {"type": "pong"})

    def _check_room(self) -> None:
        if len(self._awaited) >= self._most:
            raise InvalidRequest(f"one socket can wait for at most {self._most} tasks")

    def _wait_for(self, task_id: str, deadline: float | None) -> None:
        # The lock keeps `_arrived` from running before the subscription is stored, and it keeps a
        # client that subscribes to its own new task from getting the outcome twice.
        with self._lock:
            known = task_id in self._awaited or task_id in self._delivered
            if not self._ended and not known:
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
        self._peer.push(self._deliver, Arrival.of(outcome))

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

    def _remember(self, task_id: str) -> None:
        self._delivered[task_id] = None
        if len(self._delivered) > self._most:
            del self._delivered[next(iter(self._delivered))]

    def _say(self, reference: Any, message: dict[str, Any]) -> None:
        if reference is not None:
            message["id"] = reference
        self._peer.put(documents.encode(message))


class Arrival(NamedTuple):
    """A task that has just ended."""

    task_id: str
    #: None for a large outcome, so that the queue of messages stays small.
    outcome: Outcome | None

    @classmethod
    def of(cls, outcome: Outcome) -> Arrival:
        """Keep an outcome, or only its task's id if it is large."""
        small = memoryview(outcome.result).nbytes <= SMALL_BYTES
        return cls(outcome.task_id, outcome if small else None)


def envelopes(records: Records, arrivals: Sequence[Arrival]) -> Iterator[bytes]:
    """Yield the messages of tasks that are over.

    Their records are read in one round trip, and each large result when its message is sent.

    Raises:
      BrokerUnavailable: Redis does not answer.
    """
    found = records.records([arrival.task_id for arrival in arrivals])
    for (task_id, outcome), record in zip(arrivals, found, strict=True):
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


def _task_ids(message: dict[str, Any]) -> list[str]:
    try:
        return msgspec.convert(message, _TaskIds).all()
    except msgspec.ValidationError as exc:
        raise InvalidField(f"expected task_id or task_ids: {exc}") from None
