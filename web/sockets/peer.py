"""WebSocket clients, and what each of them may cost.

flask-sock answers the handshake. From there on, a client has a thread that reads and handles its
messages, one after the other, and a thread that sends. Both directions are bounded in bytes::

    client --> Wire.receive --> handler --put--> queue --> Wire.send --> client
                                bridge --push----^

A client that writes too fast is read later. One that reads too slowly is closed, and so is the one
that holds most while all sockets of the process together hold too much (`Budget`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Any, NamedTuple

from simple_websocket import Server  # type: ignore[import-untyped]

from inferno.errors import Overloaded
from inferno.settings import Settings
from web.sockets.budget import Budget
from web.sockets.wire import Closed, Limits, Violation, Wire

__all__ = ["Closed", "Peer", "Peers"]

log = logging.getLogger(__name__)

#: Close codes of RFC 6455.
NORMAL, GOING_AWAY, INTERNAL_ERROR, TRY_AGAIN_LATER = 1000, 1001, 1011, 1013
TOO_SLOW = (TRY_AGAIN_LATER, "the client reads too slowly")
#: Messages that are written together.
RUN = 100
#: Seconds after which an address that has too many sockets may try again.
RETRY_AFTER_S = 5

#: Writes messages: returns the JSON text of each item in order, or None to send nothing for it.
Write = Callable[[Sequence[Any]], Iterable[bytes | None]]


class _Waiting(NamedTuple):
    """A message that waits to be sent."""

    write: Write
    item: Any
    #: Bytes that it holds while it waits, and further ones while it is being sent.
    held: int
    loaded: int


class Peer:
    """One client. A thread of its own sends its messages in order."""

    #: Longest wait for a client to answer a close, in seconds.
    CLOSE_S = 2.0

    def __init__(self, sock: socket.socket, budget: Budget, limits: Limits) -> None:
        """Take over a socket after its handshake.

        Args:
          sock: the socket.
          budget: bounds what all clients hold together.
          limits: what this client may do.
        """
        self._limits = limits
        self._budget = budget
        self._share = budget.join(self._evict)
        self._wire = Wire(sock, self._share, limits)
        self._changed = threading.Condition()
        #: Messages that are not sent; each stays until it is.
        self._queue: deque[_Waiting] = deque()
        self._queued_bytes = 0
        self._sending = False
        #: Bytes of the message that is being handled.
        self._handled_bytes = 0
        self._close: tuple[int, str] | None = None
        #: Set once nothing more is read.
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer-writer", daemon=True)
        self._thread.start()

    # -- Read --------------------------------------------------------------------------------------

    def receive(self, timeout_s: float = math.inf) -> bytes | bytearray | None:
        """Return the client's next message, or None if none comes within `timeout_s` seconds.

        Raises:
          Closed: one side has closed the connection.
        """
        self.release(self.keep())
        until = time.monotonic() + timeout_s
        while self._close is None:
            message = self._receive(until)
            if message is not None:
                self._share.take(len(message), patient=True)
                self._handled_bytes = len(message)
                return message
            if time.monotonic() >= until:
                return None
        raise Closed

    def keep(self) -> int:
        """Count the message as held after the next one was received, until `release`.

        Returns:
          the bytes to release.
        """
        size, self._handled_bytes = self._handled_bytes, 0
        return size

    def release(self, size: int) -> None:
        """End what `keep` began."""
        self._share.give(size)

    @property
    def closed(self) -> bool:
        """Whether the client has hung up or is being closed: work for it can stop."""
        return self._close is not None or self._wire.has_hung_up()

    def _receive(self, until: float) -> bytes | bytearray | None:
        try:
            message = self._wire.receive(until)
        except Violation as exc:
            self._stop((exc.code, exc.reason))
            # Hanging up earlier could make the client's system discard our close frame.
            self._wire.drain()
            raise Closed from None
        except Closed:
            self._stop((NORMAL, ""))
            self._ended.set()
            raise
        if self._wire.answers:
            with self._changed:
                self._changed.notify_all()
        return message

    # -- Write -------------------------------------------------------------------------------------

    def put(self, text: bytes) -> None:
        """Queue an answer, and wait while the queue is full. After a close it is dropped.

        Args:
          text: the message, as JSON.
        """
        self._share.take(len(text), patient=True)
        with self._changed:
            self._changed.wait_for(lambda: self._fits(len(text)) or self._close)
            self._append(_Waiting(_written, text, len(text), 0))

    def offer(self, write: Write, item: Any, loaded: int) -> None:
        """Queue a message that is large or not read yet; wait while the queue is full.

        Args:
          write: as `push`.
          item: as `push`.
          loaded: as `push`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._fits(0) or self._close)
            self._append(_Waiting(write, item, 0, loaded))

    def push(self, write: Write, item: Any, held: int = 0, loaded: int = 0) -> None:
        """Queue a message without waiting; if the queue is full, close the client instead.

        Args:
          write: writes the message when its turn comes, together with the messages behind it that
            have the same writer. A lazy writer keeps few large texts in memory.
          item: what the message is written from.
          held: bytes of the item.
          loaded: bytes that writing the message adds.
        """
        self._share.take(held)
        with self._changed:
            if not self._fits(held) and self._close is None:
                self._stop(TOO_SLOW)
            self._append(_Waiting(write, item, held, loaded))

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close the socket once the queue is sent; does not wait for that."""
        with self._changed:
            if self._close is None:
                self._close = (code, reason)
                self._changed.notify_all()

    def finish(self) -> None:
        """Close the socket, and wait until the queue is sent and the client has answered."""
        self.close()
        self.release(self.keep())
        with contextlib.suppress(Closed):
            while not self._ended.is_set():
                self._receive(math.inf)
                self._wire.discard()
        self._ended.set()
        self._thread.join()
        self._wire.discard()
        self._budget.leave(self._share)

    def _fits(self, size: int) -> bool:
        if not self._queue:
            return True
        limits = self._limits
        fits = self._queued_bytes + size <= limits.max_queued_bytes
        return fits and len(self._queue) < limits.max_queued_messages

    def _append(self, message: _Waiting) -> None:
        """Queue a message whose bytes are taken already; called with the lock."""
        if self._close is not None:
            self._share.give(message.held)
            return
        self._queue.append(message)
        self._queued_bytes += message.held
        self._changed.notify_all()

    def _stop(self, close: tuple[int, str]) -> None:
        """Drop the queue and close the socket."""
        with self._changed:
            if self._close is None:
                self._close = close
            self._share.give(self._queued_bytes)
            self._queue.clear()
            self._queued_bytes = 0
            self._changed.notify_all()

    def _evict(self) -> None:
        """Close the client because of what it holds."""
        log.warning("A WebSocket is closed: the sockets of this process hold too many bytes")
        self._stop(TOO_SLOW)
        self._wire.discard()
        if self._sending:
            # No close frame can follow the part of a message that the client does not take.
            self._wire.abort(discard=True)

    def _run(self) -> None:
        cut_off = False
        try:
            while self._send_next():
                pass
            self._wire.close(*self._close or (NORMAL, ""))
            # Hanging up earlier could make the client's system discard what it has not read.
            self._ended.wait(self.CLOSE_S)
        except OSError:
            # The client has hung up, or takes nothing; the reader notices too.
            cut_off = True
        except Exception:
            log.exception("A WebSocket message could not be written")
            with contextlib.suppress(OSError):
                self._wire.close(INTERNAL_ERROR, "")
        self._stop((NORMAL, ""))
        self._wire.abort(discard=cut_off)

    def _send_next(self) -> bool:
        """Wait for something to send and send it; return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._close or self._wire.answers)
            run = self._first()
            if not run and self._close:
                return False
        self._wire.send_answers()
        texts = iter(run[0].write([message.item for message in run])) if run else iter(())
        for message in run:
            self._wire.send_answers()
            self._send(message, texts)
            if not self._sent(message):
                break
        return True

    def _first(self) -> list[_Waiting]:
        """Return the first messages that have the same writer."""
        if not self._queue:
            return []
        write = self._queue[0].write
        return list(takewhile(lambda one: one.write == write, islice(self._queue, RUN)))

    def _send(self, message: _Waiting, texts: Iterator[bytes | None]) -> None:
        taken = message.loaded
        self._share.take(taken, patient=True)
        try:
            if self._share.evicted:
                return
            text = next(texts)
            if text is None:
                return
            more = len(text) - taken - message.held
            if more > 0:
                taken += more
                self._share.take(more)
            self._sending = True
            self._wire.send(text)
        finally:
            self._sending = False
            self._share.give(taken)

    def _sent(self, message: _Waiting) -> bool:
        """Remove a message from the queue; return whether the next ones are still to be sent."""
        with self._changed:
            if not self._queue or self._queue[0] is not message:
                return False
            self._queue.popleft()
            self._queued_bytes -= message.held
            self._share.give(message.held)
            self._changed.notify_all()
            return True


def _written(texts: Sequence[bytes]) -> Iterable[bytes]:
    return texts


class Peers:
    """The WebSocket clients of this process."""

    def __init__(self, settings: Settings) -> None:
        """Begin without clients.

        Args:
          settings: the limits of each client, and of all together.
        """
        websocket = settings.websocket
        self._limits = Limits(
            max_message_bytes=websocket.max_message_bytes or settings.limits.max_body_bytes,
            max_queued_messages=websocket.max_queued_messages,
            max_queued_bytes=websocket.max_queued_bytes,
            messages_per_s=websocket.messages_per_s,
            ping_interval_s=websocket.ping_interval_s,
            message_timeout_s=websocket.message_timeout_s,
            send_timeout_s=websocket.send_timeout_s,
        )
        self._max_per_address = websocket.max_per_address
        #: Sockets never have to leave, so they may not take all connections.
        self._most = max(settings.server.connections * 3 // 4, 1)
        self._budget = Budget(websocket.max_held_bytes)
        self._open: set[Peer] = set()
        self._addresses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def held_bytes(self) -> int:
        """Bytes that all clients hold together."""
        return self._budget.held

    def require_room(self, address: str) -> None:
        """Refuse one more socket if its address or the process has too many.

        Raises:
          Overloaded: it has.
        """
        if self._addresses[address] >= self._max_per_address:
            error = Overloaded(f"one address can open at most {self._max_per_address} WebSockets")
        elif len(self._open) >= self._most:
            error = Overloaded(f"one process can open at most {self._most} WebSockets")
        else:
            return
        error.retry_after_s = RETRY_AFTER_S
        raise error

    @contextlib.contextmanager
    def open(self, ws: Server) -> Iterator[Peer]:
        """Take over a socket; at the end of the block its queue is sent and it is closed."""
        address = ws.environ.get("REMOTE_ADDR", "")
        sock: socket.socket = ws.sock
        # flask-sock must not close what is closed here.
        ws.connected = False
        _limit_stall(sock, self._limits.send_timeout_s)
        peer = Peer(sock, self._budget, self._limits)
        self._open.add(peer)
        self._addresses[address] += 1
        try:
            yield peer
        except Closed:
            pass
        except Exception:
            log.exception("A WebSocket failed")
            peer.close(INTERNAL_ERROR)
        finally:
            peer.finish()
            sock.close()
            self._open.discard(peer)
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    def close(self) -> None:
        """Tell every client that this process stops."""
        for peer in list(self._open):
            peer.close(GOING_AWAY, "the server is stopping")


def _limit_stall(sock: socket.socket, stall_s: float) -> None:
    # The kernel's limit for data that the peer does not acknowledge; only Linux has it.
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, int(stall_s * 1000))
