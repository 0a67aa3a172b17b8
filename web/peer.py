"""The sending side of WebSockets: one writer for each, with a bounded queue.

simple-websocket writes with `send`, which may take only a part of a large frame, and from whatever
thread has something to say. Here everything goes through one lock and `sendall`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from simple_websocket import ConnectionClosed, Server  # type: ignore[import-untyped]
from wsproto.utilities import LocalProtocolError

log = logging.getLogger(__name__)

#: Close codes of RFC 6455.
NORMAL, GOING_AWAY, INTERNAL_ERROR, TRY_AGAIN_LATER = 1000, 1001, 1011, 1013


class Outbox:
    """Sends messages to one client, in order, from a thread of its own."""

    #: How long a client may take to answer a close, in seconds.
    CLOSE_S = 2.0

    def __init__(self, ws: Server, limit: int) -> None:
        """Take over the sending side of a socket.

        Args:
          ws: the accepted socket.
          limit: messages that may wait; a client that reads too slowly for it is closed.
        """
        ws.sock = _Wire(ws.sock)
        self._ws = ws
        self._limit = limit
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[Callable[[], bytes]] = deque()
        self._close: tuple[int, str] | None = None
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: Callable[[], bytes]) -> None:
        """Have a message sent; never blocks. What comes after a close is dropped.

        Args:
          message: returns the JSON text; called when it is the message's turn, so that what waits
            in the queue stays small.
        """
        with self._changed:
            if self._close is None:
                if len(self._queue) < self._limit:
                    self._queue.append(message)
                else:
                    self._queue.clear()
                    self._close = (TRY_AGAIN_LATER, "the client reads too slowly")
                self._changed.notify()

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close the socket when everything queued is sent; does not wait for that."""
        with self._changed:
            if self._close is None:
                self._close = (code, reason)
                self._changed.notify()

    def join(self) -> None:
        """Wait until everything is sent and the client has answered the close."""
        self._thread.join()
        # Hanging up earlier could make the client's system discard what it has not read yet.
        self._ws.thread.join(self.CLOSE_S)

    def _run(self) -> None:
        try:
            while (message := self._next()) is not None:
                self._ws.send(message().decode())
            code, reason = self._close or (NORMAL, "")
            self._ws.close(code, reason)
        except (ConnectionClosed, LocalProtocolError, OSError):
            # It is closed already, by the client or for want of a pong; the receiver notices too.
            self._ws.connected = False
        except Exception:
            log.exception("A message could not be made")
            with contextlib.suppress(ConnectionClosed, LocalProtocolError, OSError):
                self._ws.close(INTERNAL_ERROR)
        self.close()
        self._ws.event.set()

    def _next(self) -> Callable[[], bytes] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._close)
            return self._queue.popleft() if self._queue else None


class Outboxes:
    """The outboxes of this process."""

    def __init__(self, limit: int, stall_s: float) -> None:
        """Store the limits.

        Args:
          limit: messages that may wait for each client.
          stall_s: a client that takes nothing at all for so long is cut off, in seconds.
        """
        self._limit = limit
        self._stall_s = stall_s
        self._open: set[Outbox] = set()

    @contextlib.contextmanager
    def open(self, ws: Server) -> Iterator[Outbox]:
        """Give a socket its outbox; at the end everything is sent and the socket closed."""
        _limit_stall(ws.sock, self._stall_s)
        outbox = Outbox(ws, self._limit)
        self._open.add(outbox)
        try:
            yield outbox
        except ConnectionClosed:
            pass
        except Exception:
            log.exception("A WebSocket failed")
            outbox.close(INTERNAL_ERROR)
        finally:
            outbox.close()
            outbox.join()
            self._open.discard(outbox)

    @property
    def count(self) -> int:
        """How many sockets are open."""
        return len(self._open)

    def close(self) -> None:
        """Tell every client that this process goes away."""
        for outbox in list(self._open):
            outbox.close(GOING_AWAY, "the server is stopping")


class _Wire:
    """A socket whose `send` takes everything, one caller at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, data: bytes) -> int:
        with self._lock:
            self._sock.sendall(data)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _limit_stall(sock: socket.socket, stall_s: float) -> None:
    # The kernel's own limit for data that the peer does not take; only Linux has it.
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, int(stall_s * 1000))
