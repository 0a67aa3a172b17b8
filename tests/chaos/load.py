"""Clients of every kind, which note in the ledger what they send and what they see.

Each client sends at a rate of its own, whether or not answers come, and slows down only when very
many are missing. One whose connection is cut connects again and asks for what it still waits for.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Any

import websocket

from inferno.protocol.tasks import TERMINAL, TaskState
from tests.chaos.http import CUT, Connection
from tests.chaos.ledger import Ledger, Way

MODEL = "chaos"
#: The share of the load that comes by polling, and by synchronous calls; sockets bring the rest.
POLL_SHARE, SYNC_SHARE = 0.1, 0.1
SOCKETS, SYNC_CLIENTS = 2, 8
#: So many missing answers make every client pause; nothing is lost by it.
MOST_PENDING = 3000
#: An answer that takes longer never comes, in seconds. More than a synchronous call may wait.
SILENCE_S = 40.0
#: Pause before connecting again, and between two looks at a task, in seconds.
RETRY_S, POLL_S = 0.1, 0.3
#: Most task ids in one message.
CHUNK = 500


class Load:
    """All clients."""

    def __init__(self, port: int, ledger: Ledger, rate: float) -> None:
        """Prepare the clients.

        Args:
          port: of the front end.
          ledger: where they write.
          rate: submits in a second, of all together.
        """
        self.collector = Collector(port, ledger)
        self._ended = Event()
        poll, sync = rate * POLL_SHARE, rate * SYNC_SHARE / SYNC_CLIENTS
        socket = rate * (1 - POLL_SHARE - SYNC_SHARE) / SOCKETS
        self.sockets = [
            SocketClient(f"socket-{n}", port, ledger, self._pace(ledger, socket), self.collector)
            for n in range(SOCKETS)
        ]
        senders = [Thread(target=client.send) for client in self.sockets]
        polls = self._pace(ledger, poll)
        senders.append(
            Thread(target=submit_for_polling, args=(port, ledger, polls, self.collector))
        )
        for _ in range(SYNC_CLIENTS):
            paces = self._pace(ledger, sync)
            senders.append(
                Thread(target=call_synchronously, args=(port, ledger, paces, self.collector))
            )
        self._senders = senders
        self._receivers = [Thread(target=client.receive) for client in self.sockets]
        self._receivers.append(Thread(target=self.collector.run))

    def start(self) -> None:
        """Begin."""
        for thread in (*self._receivers, *self._senders):
            thread.start()

    def end(self) -> None:
        """Submit nothing more; answers are still awaited."""
        self._ended.set()
        for thread in self._senders:
            thread.join()

    def close(self) -> None:
        """Wait for nothing more."""
        self.end()
        for client in self.sockets:
            client.close()
        self.collector.close()
        for thread in self._receivers:
            thread.join()

    def _pace(self, ledger: Ledger, rate: float) -> Iterator[None]:
        """Yield whenever a client should send, until the load ends."""
        due = time.monotonic()
        while not self._ended.is_set():
            now = time.monotonic()
            if due > now or ledger.pending >= MOST_PENDING:
                # Few sleeps, each for several submits: they leave in small bursts.
                self._ended.wait(max(due - now, 0.02))
                continue
            # Who fell behind does not make up for more than a moment.
            due = max(due + 1 / rate, now - 0.2)
            yield


class Collector:
    """Polls for the answers of tasks that were handed to it."""

    def __init__(self, port: int, ledger: Ledger) -> None:
        """Begin with none."""
        self._connection = Connection(port, SILENCE_S)
        self._ledger = ledger
        self._tasks: deque[tuple[float, str]] = deque()
        self._closed = Event()

    def take(self, task_id: str) -> None:
        """Poll for a task from now on."""
        self._tasks.append((time.monotonic() + POLL_S, task_id))

    def run(self) -> None:
        """Poll until closed."""
        while not self._closed.is_set():
            if not self._tasks or self._tasks[0][0] > time.monotonic():
                self._closed.wait(0.02)
                continue
            _, task_id = self._tasks.popleft()
            if not self.look(task_id):
                self.take(task_id)
        self._connection.close()

    def close(self) -> None:
        """Stop polling."""
        self._closed.set()

    def look(self, task_id: str) -> bool:
        """Return whether a task is over; its answer is noted."""
        try:
            status, view = self._connection.call("GET", f"/tasks/{task_id}")
        except CUT:
            self._closed.wait(RETRY_S)
            return False
        is_over = status == 200 and TaskState(view["status"]) in TERMINAL
        if is_over:
            self._ledger.answer(task_id, view)
        return is_over


def submit_for_polling(
    port: int, ledger: Ledger, pace: Iterator[None], collector: Collector
) -> None:
    """Submit at a pace, and leave the answers to the collector."""
    connection = Connection(port, SILENCE_S)
    for _ in pace:
        text = _begin(connection, ledger, Way.POLL)
        if text is None:
            continue
        try:
            status, document = connection.call("POST", "/infer", {"model": MODEL, "inputs": text})
        except CUT:
            ledger.cut([text])
            continue
        if status == 202:
            ledger.accept(text, document["task_id"])
            collector.take(document["task_id"])
        else:
            ledger.refuse(text, document["code"])
    connection.close()


def call_synchronously(
    port: int, ledger: Ledger, pace: Iterator[None], collector: Collector
) -> None:
    """Predict at a pace; a call that is only accepted in time is left to the collector."""
    connection = Connection(port, SILENCE_S)
    for _ in pace:
        text = _begin(connection, ledger, Way.SYNC)
        if text is None:
            continue
        try:
            status, document = connection.call(
                "POST", f"/v1/models/{MODEL}:predict", {"inputs": {"text": text}}
            )
        except CUT:
            ledger.cut([text])
            continue
        task_id = document.get("task_id")
        if task_id is None:
            ledger.refuse(text, document["code"])
            continue
        ledger.accept(text, task_id)
        if status == 202:
            collector.take(task_id)
        else:
            # An answer; a task that failed is told by its error.
            ledger.answer(task_id, document if status == 200 else {"error": document})
    connection.close()


def _begin(connection: Connection, ledger: Ledger, way: Way) -> str | None:
    """Connect, so that what is noted may have arrived; return None when one cannot."""
    try:
        connection.open()
    except OSError:
        time.sleep(RETRY_S)
        return None
    return ledger.submit(way)


class SocketClient:
    """Submits over one WebSocket and receives the answers there, through any number of cuts."""

    def __init__(
        self, name: str, port: int, ledger: Ledger, pace: Iterator[None], collector: Collector
    ) -> None:
        """Store who the client is; it connects in `receive`."""
        self._name = name
        self._url = f"ws://127.0.0.1:{port}/ws"
        self._ledger = ledger
        self._pace = pace
        self._collector = collector
        self._lock = Lock()
        self._closed = Event()
        self._socket: websocket.WebSocket | None = None
        #: Connections so far.
        self.connections = 0
        #: Texts that were sent on this connection, and whose submit is not answered.
        self._undecided: set[str] = set()
        #: Ids of accepted tasks whose end is awaited.
        self.waiting: set[str] = set()

    def send(self) -> None:
        """Submit at the client's pace."""
        for _ in self._pace:
            with self._lock:
                socket = self._socket
                if socket is not None:
                    text = self._ledger.submit(Way.SOCKET)
                    self._undecided.add(text)
                    message = {"type": "submit", "id": text, "model": MODEL, "inputs": text}
                    # A connection that fails here fails in `receive` too, which takes care.
                    with suppress(websocket.WebSocketException, OSError):
                        socket.send(json.dumps(message))
            if socket is None:
                time.sleep(RETRY_S)

    def receive(self) -> None:
        """Receive until closed, over one connection after the other."""
        while not self._closed.is_set():
            try:
                socket = websocket.create_connection(
                    self._url, timeout=SILENCE_S, enable_multithread=True
                )
            except (websocket.WebSocketException, OSError):
                self._closed.wait(RETRY_S)
                continue
            try:
                self._converse(socket)
            except (websocket.WebSocketException, OSError):
                pass
            finally:
                with self._lock:
                    self._socket = None
                    undecided, self._undecided = self._undecided, set()
                self._ledger.cut(undecided)
                socket.shutdown()

    def close(self) -> None:
        """Hang up, for good."""
        self._closed.set()
        with self._lock:
            if self._socket is not None:
                self._socket.close(timeout=0)

    def _converse(self, socket: websocket.WebSocket) -> None:
        self.connections += 1
        waiting = list(self.waiting)
        for at in range(0, len(waiting), CHUNK):
            socket.send(json.dumps({"type": "subscribe", "task_ids": waiting[at : at + CHUNK]}))
        with self._lock:
            self._socket = socket
        while not self._closed.is_set():
            text = socket.recv()
            if not text:
                return
            self._handle(json.loads(text))

    def _handle(self, message: dict[str, Any]) -> None:
        data = message["data"]
        if "task_id" in message:
            self._ended(message["task_id"], data)
            return
        text = message["id"]
        self._undecided.discard(text)
        if message["type"] == "accepted":
            self.waiting.add(data["task_id"])
            self._ledger.accept(text, data["task_id"])
        else:
            self._ledger.refuse(text, data["code"])

    def _ended(self, task_id: str, data: dict[str, Any]) -> None:
        self.waiting.discard(task_id)
        # A problem has a number there.
        if isinstance(data["status"], str):
            self._ledger.answer(task_id, data, f"{self._name}/{self.connections}")
        else:
            # The platform could not look the answer up just now; the socket will not say it again.
            self._collector.take(task_id)
