"""The WebSocket routes: one task on a socket of its own, or any number of tasks on one.

WS /ws/<task_id>   one envelope when the task is over, then closed
WS /ws             submit, subscribe, unsubscribe, cancel, ping; results as they come
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from flask import Blueprint, current_app
from flask_sock import Sock
from simple_websocket import Server  # type: ignore[import-untyped]

from inferno.errors import BrokerUnavailable, InfernoError
from inferno.protocol.tasks import TaskState
from tasks.state.outcomes import Outcome
from web.calls import documents
from web.calls.parameters import read
from web.calls.preference import Wait, granted_s
from web.services import services
from web.sockets import handshake
from web.sockets.conversation import Arrival, Conversation, envelope, envelopes, error_envelope
from web.sockets.peer import Peers

blueprint = Blueprint("sockets", __name__)
handshake.register(blueprint)

#: Longest and default wait of `/ws/<task_id>`, in seconds.
WAIT_S = 300.0


def _peers() -> Peers:
    peers: Peers = current_app.extensions["peers"]
    return peers


def one_task(ws: Server, task_id: str) -> None:
    """Send how one task ended, and close."""
    gateway = services().gateway
    with _peers().open(ws) as peer:
        try:
            wait_s = granted_s(read(Wait).wait, default_s=WAIT_S, most_s=WAIT_S)
            record, outcome = gateway.fetch(task_id)
            document = documents.task(task_id, record, outcome)
        except InfernoError as exc:
            peer.put(error_envelope(task_id, exc))
            return
        if TaskState(document["status"]).terminal:
            peer.put(envelope(document))
            return

        def write(arrivals: Sequence[Arrival]) -> Iterator[bytes]:
            try:
                yield from envelopes(gateway.records, arrivals)
            except BrokerUnavailable as exc:
                yield error_envelope(task_id, exc)

        def arrived(outcome: Outcome) -> None:
            arrival = Arrival.of(outcome)
            peer.push(write, arrival, arrival.held, arrival.loaded)
            peer.close()

        subscription = gateway.bridge.subscribe(task_id, arrived)
        gateway.deadlines.watch(task_id, None if record is None else record.deadline)
        try:
            deadline = time.monotonic() + wait_s
            while (remaining_s := deadline - time.monotonic()) > 0:
                # The client has nothing to say; receiving notices that it leaves.
                peer.receive(remaining_s)
        finally:
            subscription.close()
        peer.put(documents.encode({"type": "timeout", "task_id": task_id, "data": document}))


def many_tasks(ws: Server) -> None:
    """Hold a conversation about any number of tasks."""
    gateway = services().gateway
    with _peers().open(ws) as peer:
        conversation = Conversation(gateway, peer)
        try:
            while True:
                conversation.handle(peer.receive() or b"")
        finally:
            conversation.end()


_sock = Sock()
_sock.route("/ws", bp=blueprint)(many_tasks)
_sock.route("/ws/<task_id>", bp=blueprint)(one_task)
