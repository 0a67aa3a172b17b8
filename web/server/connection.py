"""The clients' connections of one process, and the limits that keep one client from harming others.

A connection is always in one phase. In most phases the process waits for the client, and each of
these waits has an end: an idle connection, a slow head, a stalled body, an answer that is not read.
`Connections.reap` looks once a second for waits that are over. It costs nothing per request.

Two limits are shared: the number of connections and the bytes that they hold. Whoever would exceed
one takes the place of the connection that has kept its client waiting for the longest time, so a
client with a thousand slow connections cannot keep anybody else out.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from heapq import nsmallest
from typing import Any

from gevent import GreenletExit

from inferno.errors import InvalidRequest, ServerBusy
from inferno.settings import Settings
from web.calls import turns
from web.server import memory

log = logging.getLogger(__name__)

#: Bytes that are read from a client at once.
READ_BYTES = 65_536
HEAD_END = b"\r\n\r\n"
#: Longest time for which a connection is processed before others get their turn, in seconds.
TURN_S = 0.005
#: How long the end of a connection waits for a client that still sends, in seconds.
LINGER_S = 2.0
#: Bytes that such a client may still send.
LINGER_BYTES = 64_000_000
#: Files that a process opens besides connections of clients.
OTHER_FILES = 200
#: Bytes of bodies and answers after which the process gives memory back to the system.
MUCH_BYTES = 8_000_000
#: Pause between two log lines about connections that were cut off, in seconds.
LOG_PAUSE_S = 10.0

#: Makes `close` discard what was not sent yet.
_RESET = struct.pack("ii", 1, 0)


class Phase(Enum):
    """What a connection is doing."""

    #: Waits for the first byte of a request.
    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    #: The process works on a request; the client waits.
    SERVING = auto()
    ANSWER = auto()
    #: The client still sends what nobody will read.
    LINGER = auto()


#: Phases in which the process waits for the client.
WAITING = frozenset(Phase) - {Phase.SERVING}


@dataclass(frozen=True)
class Limits:
    """Limits of connections; see `ServerSettings`."""

    connections: int
    per_address: int
    held_bytes: int
    head_bytes: int
    idle_s: float
    head_s: float
    stall_s: float
    bytes_per_s: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Read the limits from the settings."""
        server = settings.server
        connections = min(server.connections, _files_for(server.connections))
        return cls(
            connections=connections,
            per_address=min(server.connections_per_address, connections),
            held_bytes=server.max_held_bytes,
            head_bytes=settings.limits.max_header_bytes,
            idle_s=server.idle_timeout_s,
            head_s=server.head_timeout_s,
            stall_s=server.stall_timeout_s,
            bytes_per_s=server.min_bytes_per_s,
        )


def _files_for(connections: int) -> int:
    """Allow this process as many files as connections need; return for how many there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY:
        return connections
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(soft - OTHER_FILES, 1)


class TimedOut(InvalidRequest):
    """The client sent its request too slowly."""

    status = 408
    code = "request_timeout"
    title = "Request timeout"


class HeadTooLarge(InvalidRequest):
    """The request line and the headers are too long."""

    status = 431
    code = "request_header_fields_too_large"
    title = "Request header fields too large"


class Connection:
    """One client's connection. It has the methods of a socket that gunicorn writes answers with."""

    __slots__ = (
        "address",
        "buffer",
        "cut",
        "dropped",
        "held",
        "moved",
        "phase",
        "progressed",
        "since",
        "sock",
        "table",
        "turn",
    )

    def __init__(self, sock: socket.socket, address: str, table: Connections) -> None:
        """Take over an accepted socket.

        Args:
          sock: the socket, of gevent.
          address: the client's address; "" if it has none.
          table: the connections of this process.
        """
        self.sock = sock
        self.address = address
        self.table = table
        #: What the client sent and nobody has read yet.
        self.buffer = bytearray()
        self.phase = Phase.IDLE
        #: When the phase began.
        self.since = time.monotonic()
        #: When the client sent or took something for the last time.
        self.progressed = self.since
        #: Bytes that the client sent or took in this phase.
        self.moved = 0
        #: Bytes of bodies and answers that this connection keeps in memory.
        self.held = 0
        #: Whether the process has ended the connection: it was too slow, and is told so.
        self.cut = False
        #: Whether others needed its place: it ends without a word.
        self.dropped = False
        self.turn = self.since

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        self.phase = phase
        self.since = self.progressed = time.monotonic()
        self.moved = 0

    def serve(self) -> None:
        """Begin to work on a request."""
        self.phase = Phase.SERVING

    def fill(self) -> bool:
        """Wait for bytes of the client; return False if there will be none."""
        try:
            data = self.sock.recv(READ_BYTES)
        except ConnectionError:
            data = b""
        if self.dropped:
            raise GreenletExit
        if not data:
            return False
        self.buffer += data
        self.moved += len(data)
        self.progressed = time.monotonic()
        if self.phase is Phase.IDLE:
            # The client has waited for its answer, and others meanwhile had their turn.
            self.turn = self.progressed
        else:
            self.breathe()
        return True

    def breathe(self) -> None:
        """Let other connections have their turn if this one has had its own.

        A socket with data never waits: without this, its client would have all turns.
        """
        if time.monotonic() - self.turn > TURN_S:
            self.rest()

    def rest(self) -> None:
        """Let other connections have their turn."""
        turns.pause()
        self.turn = time.monotonic()

    def read_head(self) -> bytes | None:
        """Return the head of the next request, to its empty line; None if there is none.

        Raises:
          TimedOut: the head came too slowly.
          HeadTooLarge: it is longer than the limit.
          InvalidRequest: a line ends with a bare line feed.
        """
        buffer = self.buffer
        self.enter(Phase.HEAD if buffer else Phase.IDLE)
        if not buffer and not self.fill():
            return None
        while buffer[:2] == b"\r\n":
            # Some clients send an empty line after a body; RFC 9112 section 2.2.
            del buffer[:2]
        seen = 0
        while (end := buffer.find(HEAD_END, seen)) < 0:
            if self.phase is Phase.IDLE:
                self.enter(Phase.HEAD)
            if len(buffer) > self.table.limits.head_bytes:
                break
            if buffer.count(b"\n") != buffer.count(b"\r\n"):
                raise InvalidRequest("expected lines that end with CR LF, got a bare line feed")
            seen = max(len(buffer) - 3, 0)
            if not self.fill():
                self._check_time()
                return None
        end += len(HEAD_END)
        if not len(HEAD_END) <= end <= self.table.limits.head_bytes:
            most = self.table.limits.head_bytes
            raise HeadTooLarge(f"expected a request line and headers of at most {most} bytes")
        return self.take(end)

    def _check_time(self) -> None:
        if self.cut and self.buffer:
            raise TimedOut("the request's headers came too slowly")

    def take(self, size: int) -> bytes:
        """Return the next bytes that have come, at most `size`."""
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def hold(self, size: int) -> None:
        """Count bytes that stay in memory until the exchange ends.

        Raises:
          ServerBusy: the process holds too much already, and this request is large.
        """
        self.held += size
        if not self.table.make_room(self, size) and self.held >= turns.LARGE_BYTES:
            raise ServerBusy("the server holds too many large requests; try again")

    def sendall(self, data: bytes) -> None:
        """Send bytes, for as long as the client takes them.

        Raises:
          OSError: the client has left, or was cut off because it reads too slowly.
        """
        if self.cut:
            # Nobody looks after this connection any more, so it may not wait.
            self.sock.settimeout(0)
        self.enter(Phase.ANSWER)
        sent = self.sock.send(data)
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:])
        self.phase = Phase.SERVING

    def _send_rest(self, rest: memoryview) -> None:
        size = len(rest)
        self.held += size
        # The client has read the beginning, so this answer goes on however much is held.
        self.table.make_room(self, size)
        while rest:
            sent = self.sock.send(rest)
            rest = rest[sent:]
            self.moved += sent
            self.progressed = time.monotonic()
        self.table.release(self, size)

    send = sendall

    def end_exchange(self) -> None:
        """Forget what the last request held."""
        if self.held:
            self.table.release(self, self.held)

    def cut_off(self) -> None:
        """End the connection because its client is too slow.

        Whoever waits for the client continues, and may still tell it why.
        """
        if self.phase is Phase.ANSWER:
            self.drop()
        else:
            self.cut = True
            self._shut_down(socket.SHUT_RD)

    def drop(self) -> None:
        """End the connection; what was not sent is discarded."""
        self.dropped = True
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._shut_down(socket.SHUT_RDWR)

    def _shut_down(self, how: int) -> None:
        # A TLS socket of Python forgets its keys here, which a greenlet may be using.
        sock = getattr(self.sock, "_sock", self.sock)
        with contextlib.suppress(OSError):
            sock.shutdown(how)

    def has_left(self) -> bool:
        """Return whether the client has ended its side."""
        sock = getattr(self.sock, "_sock", self.sock)
        try:
            return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def linger(self) -> None:
        """Read what the client still sends.

        To close a socket with unread data resets the connection, and the client may lose the
        answer; RFC 9112 section 9.6.
        """
        if self.cut:
            return
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            self.enter(Phase.LINGER)
            self.buffer.clear()
            while self.moved < LINGER_BYTES and self.fill():
                self.buffer.clear()


class Connections:
    """The open connections of this process."""

    def __init__(self, limits: Limits) -> None:
        """Begin without any."""
        self.limits = limits
        #: Bytes that all connections hold.
        self.held = 0
        #: The most that they held since memory was given back.
        self._most_held = 0
        self._to_give_back = False
        self._open: set[Connection] = set()
        self._by_address: dict[str, set[Connection]] = {}
        self._ended: Counter[str] = Counter()
        self._logged = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, sock: socket.socket, address: str) -> Connection | None:
        """Take over an accepted socket; return None if there are too many.

        Args:
          sock: the socket.
          address: the client's address; "" if it has none.
        """
        neighbours = self._by_address.get(address, ())
        crowded = bool(address) and len(neighbours) >= self.limits.per_address
        if crowded and not self._drop_slowest(neighbours, "too many connections"):
            return None
        full = len(self._open) >= self.limits.connections
        if full and not self._drop_slowest(self._open, "too many connections"):
            return None
        connection = Connection(sock, address, self)
        self._open.add(connection)
        self._by_address.setdefault(address, set()).add(connection)
        return connection

    def leave(self, connection: Connection) -> None:
        """Forget a connection. A second call forgets what it has held since."""
        self.release(connection, connection.held)
        self._open.discard(connection)
        neighbours = self._by_address.get(connection.address)
        if neighbours is not None:
            neighbours.discard(connection)
            if not neighbours:
                del self._by_address[connection.address]

    def make_room(self, connection: Connection, size: int) -> bool:
        """Count bytes that a connection keeps in memory, and drop slow ones if there are too many.

        Returns:
          False if there are still too many: all others belong to requests that are complete.
        """
        self.held += size
        self._most_held = max(self._most_held, self.held)
        while self.held > self.limits.held_bytes:
            holders = [other for other in self._open if other.held and other is not connection]
            if not self._drop_slowest(holders, "too many bytes held"):
                return False
        return True

    def release(self, connection: Connection, size: int) -> None:
        """Count bytes that a connection no longer keeps in memory."""
        connection.held -= size
        self.held -= size

    def reap(self, stopping: bool) -> None:
        """Cut off the connections whose clients have let the process wait for too long.

        Args:
          stopping: whether the process ends; idle connections are then closed at once.
        """
        now = time.monotonic()
        if self._to_give_back:
            memory.give_back()
        # The connections that were cut off free their memory after this call.
        self._to_give_back = self._most_held > MUCH_BYTES and self.held < self._most_held // 2
        if self._to_give_back:
            self._most_held = self.held
        for connection in list(self._open):
            if stopping and connection.phase is Phase.IDLE:
                connection.cut_off()
            elif connection.phase is not Phase.SERVING and self._is_late(connection, now):
                self._forget(connection, f"too slow: {connection.phase.name.lower()}")
                connection.cut_off()
        self._report(now)

    def _is_late(self, connection: Connection, now: float) -> bool:
        limits, waited = self.limits, now - connection.since
        match connection.phase:
            case Phase.IDLE:
                return waited > limits.idle_s
            case Phase.HEAD:
                return waited > limits.head_s
            case Phase.LINGER:
                return waited > LINGER_S
        if now - connection.progressed > limits.stall_s:
            return True
        return waited > limits.stall_s + connection.moved / limits.bytes_per_s

    def _drop_slowest(self, connections: Collection[Connection], reason: str) -> bool:
        """Drop a few connections that wait for their clients; return whether there are any.

        Those in the middle of a request or an answer come before idle ones, and the slowest come
        first. If none waits, those go whose clients have left. Dropping one at a time would mean a
        search for each new connection of an attacker.
        """
        waiting = [other for other in connections if other.phase in WAITING]
        if not waiting:
            waiting = [other for other in connections if other.has_left()]
        slowest = nsmallest(
            1 + len(waiting) // 64,
            waiting,
            key=lambda other: (other.phase is Phase.IDLE, other.since),
        )
        for connection in slowest:
            self._forget(connection, reason)
            connection.drop()
        return bool(slowest)

    def _forget(self, connection: Connection, reason: str) -> None:
        if connection.phase is not Phase.IDLE:
            self._ended[f"{connection.address}, {reason}"] += 1
        self.leave(connection)

    def _report(self, now: float) -> None:
        """Log who was cut off, in one line for all."""
        if self._ended and now - self._logged > LOG_PAUSE_S:
            (most, _), *_ = self._ended.most_common(1)
            total = sum(self._ended.values())
            log.warning("Closed %d slow connections; most of them: %s", total, most)
            self._ended.clear()
            self._logged = now


def address_of(peer: Any) -> str:
    """Return the address of a client as `accept` names it; "" for a Unix socket."""
    return peer[0] if isinstance(peer, tuple) else ""
