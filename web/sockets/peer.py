"""WebSocket clients, with bounded queues in both directions.

simple-websocket writes from any thread with `send`, which may take only a part of a large frame,
and reads as fast as messages come. Here each client has one writer thread with a bounded queue,
every write goes through one lock and `sendall`, and reading pauses while too many messages wait.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from simple_websocket import ConnectionClosed, Server  # type: ignore[import-untyped]
from wsproto.utilities import LocalProtocolError

log = logging.getLogger(__name__)

#: Close codes of RFC 6455.
NORMAL, GOING_AWAY, INTERNAL_ERROR, TRY_AGAIN_LATER = 1000, 1001, 1011, 1013

#: Writes messages: returns the JSON text of each item in order, or None to send nothing for it.
Write = Callable[[Sequence[Any]], Iterable[bytes | None]]


class Peer:
    """One client. A thread of its own sends its messages in order."""

    #: Longest wait for a client to answer a close, in seconds.
    CLOSE_S = 2.0

    def __init__(self, ws: Server, limit: int) -> None:
        """Take over an accepted socket.

        Args:
          ws: the socket.
          limit: messages that may wait in each direction. A client that reads too slowly is closed;
            a client that writes too fast is read more slowly.
        """
        ws.sock = _Wire(ws.sock, lambda: len(ws.input_buffer) < limit)
        self._ws = ws
        self._limit = limit
        self._changed = threading.Condition()
        #: Messages that are not sent; each stays until it is.
        self._queue: deque[tuple[Write, Any]] = deque()
        self._close: tuple[int, str] | None = None
        self._thread = threading.Thread(target=self._run, name="peer-writer", daemon=True)
        self._thread.start()

    def receive(self, timeout_s: float | None = None) -> str | bytes | None:
        """Return the client's next message, or None if none comes within `timeout_s` seconds.

        Raises:
          ConnectionClosed: one side has closed the connection.
        """
        message: str | bytes | None = self._ws.receive(timeout_s)
        self._ws.sock.resume()
        return message

    def put(self, text: bytes) -> None:
        """Queue an answer, and wait while the queue is full. After a close it is dropped.

        Args:
          text: the message, as JSON.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) < self._limit or self._close)
            if self._close is None:
                self._queue.append((_written, text))
                self._changed.notify_all()

    def push(self, write: Write, item: Any) -> None:
        """Queue a message without waiting; if the queue is full, close the client instead.

        Args:
          write: writes the message when its turn comes, together with the messages behind it that
            have the same writer. A lazy writer keeps few large texts in memory.
          item: what the message is written from.
        """
        with self._changed:
            if self._close is None:
                if len(self._queue) < self._limit:
                    self._queue.append((write, item))
                else:
                    self._queue.clear()
                    self._close = (TRY_AGAIN_LATER, "the client reads too slowly")
                self._changed.notify_all()

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close the socket once the queue is sent; does not wait for that."""
        with self._changed:
            if self._close is None:
                self._close = (code, reason)
                self._changed.notify_all()

    def join(self) -> None:
        """Wait until the queue is sent and the client has answered the close."""
        self._thread.join()
        # Hanging up earlier could make the client's system discard messages it has not read.
        self._ws.thread.join(self.CLOSE_S)

    def _run(self) -> None:
        try:
            while run := self._next():
                write = run[0][0]
                texts = write([item for _, item in run])
                for message, text in zip(run, texts, strict=True):
                    if text is not None:
                        self._ws.send(text.decode())
                    if not self._sent(message):
                        break
            code, reason = self._close or (NORMAL, "")
            self._ws.close(code, reason)
        except (ConnectionClosed, LocalProtocolError, OSError):
            # The client has closed the socket or answered no ping; the receiver notices too.
            self._ws.connected = False
        except Exception:
            log.exception("A WebSocket message could not be written")
            with contextlib.suppress(ConnectionClosed, LocalProtocolError, OSError):
                self._ws.close(INTERNAL_ERROR)
        self.close()
        self._ws.event.set()
        self._ws.sock.resume()

    def _next(self) -> list[tuple[Write, Any]]:
        """Wait for messages; return the first ones with the same writer, or none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._close)
            if not self._queue:
                return []
            write = self._queue[0][0]
            return list(takewhile(lambda message: message[0] == write, self._queue))

    def _sent(self, message: tuple[Write, Any]) -> bool:
        """Remove a message from the queue; return whether the next ones are still to be sent."""
        with self._changed:
            if not self._queue or self._queue[0] is not message:
                return False
            self._queue.popleft()
            self._changed.notify_all()
            return True


def _written(texts: Sequence[bytes]) -> Iterable[bytes]:
    return texts


class Peers:
    """The WebSocket clients of this process."""

    def __init__(self, limit: int, stall_s: float) -> None:
        """Store the limits.

        Args:
          limit: messages that may wait in each direction of each socket.
          stall_s: time without progress after which a client is cut off, in seconds.
        """
        self._limit = limit
        self._stall_s = stall_s
        self._open: set[Peer] = set()

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def open(self, ws: Server) -> Iterator[Peer]:
        """Take over a socket; at the end of the block its queue is sent and it is closed."""
        _limit_stall(ws.sock, self._stall_s)
        peer = Peer(ws, self._limit)
        self._open.add(peer)
        try:
            yield peer
        except ConnectionClosed:
            pass
        except Exception:
            log.exception("A WebSocket failed")
            peer.close(INTERNAL_ERROR)
        finally:
            peer.close()
            peer.join()
            self._open.discard(peer)

    def close(self) -> None:
        """Tell every client that this process stops."""
        for peer in list(self._open):
            peer.close(GOING_AWAY, "the server is stopping")


class _Wire:
    """A socket whose `send` sends everything, one caller at a time, and whose `recv` may pause."""

    def __init__(self, sock: socket.socket, has_room: Callable[[], bool]) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._reading = threading.Condition()
        self._has_room = has_room

    def send(self, data: bytes) -> int:
        with self._sending:
            self._sock.sendall(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        with self._reading:
            self._reading.wait_for(self._has_room)
        return self._sock.recv(size)

    def resume(self) -> None:
        with self._reading:
            self._reading.notify()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _limit_stall(sock: socket.socket, stall_s: float) -> None:
    # The kernel's limit for data that the peer does not acknowledge; only Linux has it.
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, int(stall_s * 1000))
