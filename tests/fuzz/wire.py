"""Sends a case on a connection of its own, and keeps what comes back."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.fuzz.case import Case, Ending

#: Longest time without a byte until all answers are there, or until the end, in seconds.
PATIENCE_S = 5.0
#: The same for a connection that cannot go on and must be closed.
CLOSE_S = 3.0
#: Time without a byte after which the client ends its side, in seconds.
QUIET_S = 0.5

Address = tuple[str, int]


@dataclass(frozen=True)
class Exchange:
    """What one connection has brought."""

    received: bytes
    #: Whether the server has closed the connection.
    closed: bool
    #: Whether neither an answer nor the end came in time.
    hung: bool


def exchange(address: Address, case: Case, is_complete: Callable[[bytes], bool]) -> Exchange:
    """Send a case; return what came back.

    Args:
      address: host and port.
      case: what to send.
      is_complete: says of received bytes whether all answers are there.
    Raises:
      OSError: the server does not accept the connection.
    """
    with socket.create_connection(address, timeout=PATIENCE_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(sock, is_complete)
        connection.send(case)
        if case.ending is Ending.RESET:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return Exchange(b"", closed=True, hung=False)
        if case.closes:
            connection.read(CLOSE_S, to_the_end=True)
        elif case.ending is Ending.WAIT:
            connection.read(PATIENCE_S)
        else:
            connection.read(QUIET_S)
            if not connection.finished:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                connection.read(PATIENCE_S)
        return Exchange(bytes(connection.received), connection.closed, hung=not connection.finished)


class _Connection:
    """A connection while it is read."""

    def __init__(self, sock: socket.socket, is_complete: Callable[[bytes], bool]) -> None:
        self.received = bytearray()
        self.closed = False
        self._sock = sock
        self._is_complete = is_complete

    @property
    def finished(self) -> bool:
        return self.closed or self._is_complete(bytes(self.received))

    def send(self, case: Case) -> None:
        """Send all pieces; a socket's frames follow the answer to its handshake."""
        for number, piece in enumerate(case.pieces):
            if number and case.socket:
                self._read_handshake()
            elif number and case.gap_s:
                time.sleep(case.gap_s)
            try:
                self._sock.sendall(piece)
            except OSError:
                return  # The server has closed; what it said before can still be read.

    def read(self, patience_s: float, to_the_end: bool = False) -> None:
        """Read until all answers are there or the server closes, as long as something comes."""
        while not self.closed and (to_the_end or not self.finished):
            if not self._receive(patience_s):
                return

    def _read_handshake(self) -> None:
        while b"\r\n\r\n" not in self.received and not self.closed:
            if not self._receive(PATIENCE_S):
                return

    def _receive(self, timeout_s: float) -> bool:
        """Read once; return whether something came, even if it is the end."""
        self._sock.settimeout(timeout_s)
        try:
            chunk = self._sock.recv(262_144)
        except TimeoutError:
            return False
        except OSError:
            chunk = b""  # A reset ends the connection, too.
        self.received += chunk
        self.closed = self.closed or not chunk
        return True
