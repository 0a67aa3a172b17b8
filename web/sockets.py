"""WebSockets: one task on a socket of its own, or any number of tasks on one.

WS /ws/<task_id>   one envelope when the task is over, then closed
WS /ws             submit, subscribe, unsubscribe, cancel, ping; results as they come
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
from flask import Blueprint, request
from flask_sock import Sock
from simple_websocket import Server  # type: ignore[import-untyped]

from inferno.errors import BrokerUnavailable, InfernoError, InvalidField, InvalidRequest
from inferno.protocol.requests import convert_submit
from inferno.protocol.tasks import TaskState
from tasks.records import Outcome
from web import documents
from web.bridge import Subscription
from web.errors import UNEXPECTED
from web.idempotency import from_field
from web.peer import Peer
from web.preference import wait_parameter
from web.services import Services, services

blueprint = Blueprint("sockets", __name__)

#: How long `/ws/<task_id>` waits at most, and by default, in seconds.
WAIT_S = 300.0
#: Submits of one socket that are under way at the same time.
SUBMITTING = 32

log = logging.getLogger(__name__)


def one_task(ws: Server, task_id: str) -> None:
    """Tell a client how one task ended."""
    here = services()
    wait = request.args.get("wait")
    with here.peers.open(ws) as peer:
        try:
            wait_s = wait_parameter(wait, default_s=WAIT_S, most_s=WAIT_S)
            record, outcome = here.fetch(task_id)
            document = documents.task(task_id, record, outcome)
        except InfernoError as exc:
            peer.put(_error(task_id, exc))
            return
        if TaskState(document["status"]).terminal:
            peer.put(_envelope(document))
            return

        def last_word() -> bytes:
            try:
                return _outcome(here, task_id)
            except BrokerUnavailable as exc:
                return _error(task_id, exc)

        def arrived(_: Outcome) -> None:
            peer.push(last_word)
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
    with here.peers.open(ws) as peer:
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
        try:
            self._check_room()
            key = message.pop("idempotency_key", None)
            said = msgspec.json.encode(message, order="sorted")
            idempotency = from_field(key, "submit", said)
            task = self._here.submit(convert_submit(message), idempotency)
        except InfernoError as exc:
            self._say(reference, {"type": "error", "data": exc.problem()})
        except Exception:
            log.exception("A submit failed")
            self._say(reference, {"type": "error", "data": UNEXPECTED.problem()})
        else:
            # Subscribed only then, so that the result comes after this; nothing is missed by it.
            answer = {"type": "accepted", "data": documents.accepted(task, message)}
            if task.replayed:
                self._say(reference, answer | {"replayed": True})
                self._join(task.task_id)
            else:
                self._say(reference, answer)
                self._wait_for(task.task_id, task.deadline)
        finally:
            self._submitting.release()

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
                if task_id in self._delivered:
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
                problem = exc.problem() | {"task_id": task_id}
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
            self._waiting.pop(task_id, None)
            self._remember(task_id)
        self._peer.push(lambda: self._deliver(task_id))

    def _deliver(self, task_id: str) -> bytes | None:
        try:
            return _outcome(self._here, task_id)
        except BrokerUnavailable:
            # It arrives again when the bridge has its connection back.
            with self._lock:
                self._delivered.pop(task_id, None)
            self._wait_for(task_id, None)
            return None

    def _remember(self, task_id: str) -> None:
        self._delivered[task_id] = None
        if len(self._delivered) > self._most:
            del self._delivered[next(iter(self._delivered))]

    def _say(self, reference: Any, message: dict[str, Any]) -> None:
        if reference is not None:
            message["id"] = reference
        self._peer.put(documents.encode(message))


def _outcome(here: Services, task_id: str) -> bytes:
    """Return the envelope of a task that is over.

    Raises:
      BrokerUnavailable: Redis does not answer.
    """
    parts = here.records.fetch(task_id)
    try:
        return _envelope(documents.task(task_id, *parts))
    except InfernoError as exc:
        return _error(task_id, exc)


def _envelope(document: dict[str, Any]) -> bytes:
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
