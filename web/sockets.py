"""WebSockets: one task on a socket of its own, or any number of tasks on one.

WS /ws/<task_id>   one envelope when the task is over, then closed
WS /ws             submit, subscribe, unsubscribe, ping; results as they come
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
from flask import Blueprint, request
from flask_sock import Sock
from simple_websocket import Server  # type: ignore[import-untyped]

from inferno.errors import InfernoError, InvalidRequest
from inferno.protocol.requests import convert_submit
from inferno.protocol.tasks import TaskState
from tasks.records import Outcome
from web import documents
from web.bridge import Subscription
from web.outbox import Outbox
from web.preference import wait_parameter
from web.services import Services, services

blueprint = Blueprint("sockets", __name__)

#: How long `/ws/<task_id>` waits at most, and by default, in seconds.
WAIT_S = 300.0


def one_task(ws: Server, task_id: str) -> None:
    """Tell a client how one task ended."""
    here = services()
    wait = request.args.get("wait")
    with here.outboxes.open(ws) as outbox:
        try:
            wait_s = wait_parameter(wait, default_s=WAIT_S, most_s=WAIT_S)
            pending = documents.task(task_id, *here.records.fetch(task_id))
        except InfernoError as exc:
            outbox.put(_ready({"type": "error", "task_id": task_id, "data": exc.problem()}))
            return

        def arrived(_: Outcome) -> None:
            outbox.put(lambda: _envelope(here, task_id))
            outbox.close()

        subscription = here.bridge.subscribe(task_id, arrived)
        try:
            deadline = time.monotonic() + wait_s
            while (remaining_s := deadline - time.monotonic()) > 0:
                # Nothing is expected from the client, but that it leaves is noticed here.
                ws.receive(remaining_s)
        finally:
            subscription.close()
        outbox.put(_ready({"type": "timeout", "task_id": task_id, "data": pending}))


def many_tasks(ws: Server) -> None:
    """Hold a conversation about any number of tasks."""
    here = services()
    with here.outboxes.open(ws) as outbox:
        conversation = Conversation(here, outbox)
        try:
            while True:
                conversation.handle(ws.receive())
        finally:
            conversation.end()


_sock = Sock()
_sock.route("/ws", bp=blueprint)(many_tasks)
_sock.route("/ws/<task_id>", bp=blueprint)(one_task)


class _TaskIds(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `subscribe` and `unsubscribe`."""

    task_id: str | None = None
    task_ids: list[str] = []

    def all(self) -> list[str]:
        return self.task_ids if self.task_id is None else [self.task_id, *self.task_ids]


class Conversation:
    """One multiplexed socket: what its client says, and the tasks it waits for."""

    def __init__(self, here: Services, outbox: Outbox) -> None:
        """Begin; nothing is waited for yet."""
        self._here = here
        self._outbox = outbox
        self._most = here.settings.websocket.max_subscriptions
        self._lock = threading.Lock()
        self._waiting: dict[str, Subscription] = {}
        #: The last tasks that were delivered, so that none arrives twice.
        self._delivered: dict[str, None] = {}
        self._handlers: dict[str, Callable[[Any, dict[str, Any]], None]] = {
            "submit": self._submit,
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
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
                raise InvalidRequest(f"expected one of {known}, got {kind!r:.80}", "type")
            handler(reference, message)
        except InfernoError as exc:
            self._say(reference, {"type": "error", "data": exc.problem()})

    def end(self) -> None:
        """Wait for nothing any more."""
        with self._lock:
            subscriptions = list(self._waiting.values())
        for subscription in subscriptions:
            subscription.close()

    def _submit(self, reference: Any, message: dict[str, Any]) -> None:
        self._check_room()
        task = self._here.submit(convert_submit(message))
        # Only then subscribe, so that the result comes after this; by being late nothing is missed.
        self._say(reference, {"type": "accepted", "data": documents.accepted(task, message)})
        self._wait_for(task.task_id)

    def _subscribe(self, _: Any, message: dict[str, Any]) -> None:
        for task_id in _task_ids(message):
            if task_id not in self._waiting and task_id not in self._delivered:
                self._check_room()
                self._join(task_id)

    def _join(self, task_id: str) -> None:
        try:
            # Raises when there is nothing to wait for: the task is unknown, or its result is gone.
            documents.task(task_id, *self._here.records.fetch(task_id))
        except InfernoError as exc:
            self._say(None, {"type": "error", "task_id": task_id, "data": exc.problem()})
        else:
            self._wait_for(task_id)

    def _unsubscribe(self, _: Any, message: dict[str, Any]) -> None:
        for task_id in _task_ids(message):
            with self._lock:
                subscription = self._waiting.pop(task_id, None)
            if subscription is not None:
                subscription.close()

    def _ping(self, reference: Any, _: dict[str, Any]) -> None:
        self._say(reference, {"type": "pong"})

    def _check_room(self) -> None:
        if len(self._waiting) >= self._most:
            raise InvalidRequest(f"one socket can wait for at most {self._most} tasks")

    def _wait_for(self, task_id: str) -> None:
        # The lock keeps `_arrived` from running before the subscription is noted.
        with self._lock:
            self._waiting[task_id] = self._here.bridge.subscribe(task_id, self._arrived)

    def _arrived(self, outcome: Outcome) -> None:
        task_id = outcome.task_id
        with self._lock:
            self._waiting.pop(task_id, None)
            self._delivered[task_id] = None
            if len(self._delivered) > self._most:
                del self._delivered[next(iter(self._delivered))]
        self._outbox.put(lambda: _envelope(self._here, task_id))

    def _say(self, reference: Any, message: dict[str, Any]) -> None:
        if reference is not None:
            message["id"] = reference
        self._outbox.put(_ready(message))


def _ready(message: dict[str, Any]) -> Callable[[], bytes]:
    text = documents.encode(message)
    return lambda: text


def _envelope(here: Services, task_id: str) -> bytes:
    try:
        document = documents.task(task_id, *here.records.fetch(task_id))
    except InfernoError as exc:
        kind, document = "error", exc.problem()
    else:
        kind = "result" if document["status"] == TaskState.SUCCEEDED else "error"
    return documents.encode({"type": kind, "task_id": task_id, "data": document})


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
        raise InvalidRequest(f"expected task_id or task_ids: {exc}") from None
