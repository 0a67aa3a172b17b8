"""WebSockets: one task on a socket of its own, or any number of tasks on one.

WS /ws/<task_id>   one envelope when the task is over, then closed
WS /ws             submit, subscribe, unsubscribe, cancel, ping; results as they come
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from flask import Blueprint, current_app
from flask_sock import Sock
from simple_websocket import Server  # type: ignore[import-untyped]

from inferno.errors import BrokerUnavailable, InfernoError, InvalidField, InvalidRequest
from inferno.protocol.requests import convert_submit
from inferno.protocol.tasks import TaskState
from tasks.intake.submit import new_task_id
from tasks.results.bridge import Subscription
from tasks.results.views import TaskView
from tasks.state.records import Outcome
from web.calls import documents
from web.calls.errors import UNEXPECTED
from web.calls.idempotency import from_field
from web.calls.parameters import read
from web.calls.preference import Wait, granted_s
from web.services import Services, services
from web.sockets.peer import Peer, Peers

blueprint = Blueprint("sockets", __name__)

#: How long `/ws/<task_id>` waits at most, and by default, in seconds.
WAIT_S = 300.0
#: Results of at most so many bytes are kept while they wait to be sent; others are fetched again.
SMALL_BYTES = 16_384
#: Submits of one socket that are under way at the same time.
SUBMITTING = 32

log = logging.getLogger(__name__)


def _peers() -> Peers:
    peers: Peers = current_app.extensions["peers"]
    return peers


def one_task(ws: Server, task_id: str) -> None:
    """Tell a client how one task ended."""
    here = services()
    with _peers().open(ws) as peer:
        try:
            wait_s = granted_s(read(Wait).wait, default_s=WAIT_S, most_s=WAIT_S)
            record, outcome = here.fetch(task_id)
            document = documents.task(task_id, record, outcome)
        except InfernoError as exc:
            peer.put(_error(task_id, exc))
            return
        if TaskState(document["status"]).terminal:
            peer.put(_envelope(document))
            return

        def last_word(arrivals: Sequence[_Arrival]) -> Iterator[bytes]:
            try:
                yield from _outcomes(here, arrivals)
            except BrokerUnavailable as exc:
                yield _error(task_id, exc)

        def arrived(outcome: Outcome) -> None:
            peer.push(last_word, _Arrival.of(outcome))
            peer.close()

        subscription = here.bridge.subscribe(task_id, arrived)
        here.deadlines.watch(task_id, None if record is None else record.deadline)
        try:
            deadline = time.monotonic() + wait_s
            while (remaining_s := deadline - time.monotonic()) > 0:
                # Nothing is expected from the client, but that it leaves is noticed here.
                peer.receive(remaining_s)
        finally:
            subscription.close()
        peer.put(documents.encode({"type": "timeout", "task_id": task_id, "data": document}))


def many_tasks(ws: Server) -> None:
    """Hold a conversation about any number of tasks."""
    here = services()
    with _peers().open(ws) as peer:
        conversation = Conversation(here, peer)
        try:
            while True:
                conversation.handle(peer.receive() or b"")
        finally:
            conversation.end()


_sock = Sock()
_sock.route("/ws", bp=blueprint)(many_tasks)
_sock.route("/ws/<task_id>", bp=blueprint)(one_task)


class _TaskIds(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `subscribe`, `unsubscribe` and `cancel`."""

    task_id: str | None = None
    task_ids: list[str] = []

    def all(self) -> list[str]:
        return self.task_ids if self.task_id is None else [self.task_id, *self.task_ids]


class Conversation:
    """One multiplexed socket: what its client says, and the tasks it waits for."""

    def __init__(self, here: Services, peer: Peer) -> None:
        """Begin; nothing is waited for yet."""
        self._here = here
        self._peer = peer
        self._most = here.settings.websocket.max_subscriptions
        self._submitting = threading.BoundedSemaphore(SUBMITTING)
        self._lock = threading.Lock()
        self._ended = False
        self._waiting: dict[str, Subscription] = {}
        #: Tasks whose acceptance is not said yet, with the outcomes of those that are over already.
        self._unsaid: dict[str, Outcome | None] = {}
        #: The last tasks that were delivered, so that none arrives twice.
        self._delivered: dict[str, None] = {}
        self._handlers: dict[str, Callable[[Any, dict[str, Any]], None]] = {
            "submit": self._submit,
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
            "cancel": self._cancel,
            "ping": self._ping,
        }

    def handle(self, text: str | bytes) -> None:
        """Do what a message asks for; a bad one is answered with an error."""
        reference = None
        try:
            message = _decode(text)
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
        """Wait for nothing any more."""
        with self._lock:
            self._ended = True
            subscriptions = list(self._waiting.values())
        for subscription in subscriptions:
            subscription.close()

    def _submit(self, reference: Any, message: dict[str, Any]) -> None:
        # One after the other, a burst would reach its lane as a trickle, and ride in small batches.
        self._submitting.acquire()
        run = threading.Thread(target=self._submit_one, args=(reference, message), daemon=True)
        run.start()

    def _submit_one(self, reference: Any, message: dict[str, Any]) -> None:
        task_id = new_task_id()
        said = False
        try:
            self._expect(task_id)
            key = message.pop("idempotency_key", None)
            text = msgspec.json.encode(message, order="sorted")
            idempotency = from_field(key, "submit", text)
            task = self._here.submit(convert_submit(message), idempotency, task_id)
            answer = {"type": "accepted", "data": documents.accepted(task, message)}
            if task.replayed:
                self._say(reference, answer | {"replayed": True})
                self._join(task.task_id)
            else:
                self._say(reference, answer)
                said = True
                if task.outcome is not None:
                    # It was over at once, and nobody will tell.
                    self._arrived(task.outcome)
                self._here.deadlines.watch(task_id, task.deadline)
        except InfernoError as exc:
            self._say(reference, {"type": "error", "data": exc.problem()})
        except Exception:
            log.exception("A submit failed")
            self._say(reference, {"type": "error", "data": UNEXPECTED.problem()})
        finally:
            self._settle_expected(task_id, said)
            self._submitting.release()

    def _expect(self, task_id: str) -> None:
        """Wait for a task that is about to be submitted; its outcome is held back until released.

        Raises:
          InvalidRequest: the socket waits for too many.
        """
        self._check_room()
        with self._lock:
            if not self._ended:
                self._unsaid[task_id] = None
                self._waiting[task_id] = self._here.bridge.expect(task_id, self._arrived)

    def _settle_expected(self, task_id: str, said: bool) -> None:
        """Deliver the outcome if it has come; without an acceptance, lose interest in it."""
        with self._lock:
            outcome = self._unsaid.pop(task_id, None)
            subscription = None if said else self._waiting.pop(task_id, None)
        if subscription is not None:
            subscription.close()
        elif outcome is not None:
            self._arrived(outcome)

    def _subscribe(self, _: Any, message: dict[str, Any]) -> None:
        for task_id in _task_ids(message):
            if task_id not in self._waiting and task_id not in self._delivered:
                self._check_room()
                self._join(task_id)

    def _join(self, task_id: str) -> None:
        try:
            record, outcome = self._here.fetch(task_id)
            document = documents.task(task_id, record, outcome)
        except InfernoError as exc:
            self._peer.put(_error(task_id, exc))
            return
        if TaskState(document["status"]).terminal:
            with self._lock:
                # Who waits for it already is told by the bridge.
                if task_id in self._delivered or task_id in self._waiting:
                    return
                self._remember(task_id)
            self._peer.put(_envelope(document))
        else:
            self._wait_for(task_id, None if record is None else record.deadline)

    def _unsubscribe(self, _: Any, message: dict[str, Any]) -> None:
        for task_id in _task_ids(message):
            with self._lock:
                subscription = self._waiting.pop(task_id, None)
            if subscription is not None:
                subscription.close()

    def _cancel(self, reference: Any, message: dict[str, Any]) -> None:
        for task_id in _task_ids(message):
            try:
                self._here.control.cancel(task_id)
            except InfernoError as exc:
                # Not under the task's id: its outcome may still be on its way.
                problem = {**exc.problem(), "task_id": task_id}
                self._say(reference, {"type": "error", "data": problem})
            else:
                self._say(reference, {"type": "cancelled", "task_id": task_id})

    def _ping(self, reference: Any, _: dict[str, Any]) -> None:
        self._say(reference, {"type": "pong"})

    def _check_room(self) -> None:
        if len(self._waiting) >= self._most:
            raise InvalidRequest(f"one socket can wait for at most {self._most} tasks")

    def _wait_for(self, task_id: str, deadline: float | None) -> None:
        # The lock keeps `_arrived` from running before the subscription is noted, and a client that
        # subscribes to what it has just submitted from being told twice.
        with self._lock:
            known = task_id in self._waiting or task_id in self._delivered
            if not self._ended and not known:
                self._waiting[task_id] = self._here.bridge.subscribe(task_id, self._arrived)
                self._here.deadlines.watch(task_id, deadline)

    def _arrived(self, outcome: Outcome) -> None:
        task_id = outcome.task_id
        with self._lock:
            if task_id in self._unsaid:
                self._unsaid[task_id] = outcome
                return
            subscription = self._waiting.pop(task_id, None)
            if subscription is None:
                return
            self._remember(task_id)
        subscription.close()
        self._peer.push(self._deliver, _Arrival.of(outcome))

    def _deliver(self, arrivals: Sequence[_Arrival]) -> Iterator[bytes | None]:
        left = [arrival.task_id for arrival in arrivals]
        try:
            for text in _outcomes(self._here, arrivals):
                del left[0]
                yield text
        except BrokerUnavailable:
            # They arrive again when the bridge has its connection back.
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


class _Arrival(NamedTuple):
    """A task that has just ended."""

    task_id: str
    #: None where it is large, so that what waits to be sent stays small.
    outcome: Outcome | None

    @classmethod
    def of(cls, outcome: Outcome) -> _Arrival:
        """Keep an outcome, or what it takes to read it again."""
        small = memoryview(outcome.result).nbytes <= SMALL_BYTES
        return cls(outcome.task_id, outcome if small else None)


def _outcomes(here: Services, arrivals: Sequence[_Arrival]) -> Iterator[bytes]:
    """Yield the envelopes of tasks that are over.

    Their records are read in one round trip; a large result when it is its turn.

    Raises:
      BrokerUnavailable: Redis does not answer.
    """
    records = here.records.records([arrival.task_id for arrival in arrivals])
    for (task_id, outcome), record in zip(arrivals, records, strict=True):
        if outcome is None:
            record, outcome = here.records.fetch(task_id)
        try:
            yield _envelope(documents.task(task_id, record, outcome))
        except InfernoError as exc:
            yield _error(task_id, exc)


def _envelope(document: TaskView) -> bytes:
    kind = "result" if document["status"] == TaskState.SUCCEEDED else "error"
    return documents.encode({"type": kind, "task_id": document["task_id"], "data": document})


def _error(task_id: str, error: InfernoError) -> bytes:
    return documents.encode({"type": "error", "task_id": task_id, "data": error.problem()})


def _decode(text: str | bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise InvalidRequest(f"expected a JSON object: {exc}") from None
    except RecursionError:
        raise InvalidRequest("the message is nested too deeply") from None


def _task_ids(message: dict[str, Any]) -> list[str]:
    try:
        return msgspec.convert(message, _TaskIds).all()
    except msgspec.ValidationError as exc:
        raise InvalidField(f"expected task_id or task_ids: {exc}") from None
