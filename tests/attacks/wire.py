"""Connections of an attacker: HTTP and WebSocket, byte by byte, right or wrong."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

PING = 0x9
PONG = 0xA
TEXT = 0x1


class Attacker:
    """Opens connections to a platform until its time is over."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        """Store the target.

        Args:
          host: address of the front end.
          port: of the front end.
          seconds: time that the attack has.
        """
        self.host = host
        self.port = port
        self._end = time.monotonic() + seconds
        #: What the platform should not have done, for the report.
        self.findings: list[str] = []

    @property
    def left_s(self) -> float:
        """Time that the attack still has, in seconds."""
        return max(self._end - time.monotonic(), 0.0)

    def wait(self) -> None:
        """Let the rest of the time pass."""
        time.sleep(self.left_s)

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """Open a connection.

        Args:
          receive_buffer: its size in bytes, for a client that reads little.
        """
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect((self.host, self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def head(self, line: str, **headers: object) -> bytes:
        """Return the head of a request; `content_length=5` becomes `content-length: 5`."""
        fields = {"host": f"{self.host}:{self.port}"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def post(self, path: str, body: bytes, **headers: object) -> bytes:
        """Return a POST with a body."""
        return self.head(f"POST {path}", **{"content_length": len(body), **headers}) + body

    def call(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and return the answer's status and what came with it, 0 for no answer."""
        with self.connect() as connection:
            with suppress(OSError):
                connection.sendall(request)
            answer = receive(connection, max(self.left_s, 1.0), enough=re.compile(rb"\r\n\r\n."))
        statuses = statuses_of(answer)
        return (statuses[0] if statuses else 0), answer

    def pour(self, connection: socket.socket, data: bytes, limit: int) -> int:
        """Send the same bytes over and over; returns how many were taken until an error."""
        sent = 0
        with suppress(OSError):
            while sent < limit and (left_s := self.left_s):
                connection.settimeout(left_s)
                connection.sendall(data)
                sent += len(data)
        return sent


def receive(
    connection: socket.socket, timeout_s: float, enough: re.Pattern[bytes] | None = None
) -> bytes:
    """Read until the other side closes, is silent for some time, or has said enough."""
    received = b""
    connection.settimeout(timeout_s)
    with suppress(OSError):
        while data := connection.recv(1 << 16):
            received += data
            if enough is not None and enough.search(received):
                break
    return received


def statuses_of(received: bytes) -> list[int]:
    """Return the statuses of all answers in what was received."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", received)]


def drain(connection: socket.socket) -> None:
    """Read everything, in a thread, until the connection ends."""

    def read() -> None:
        connection.settimeout(60)
        with suppress(OSError):
            while connection.recv(1 << 20):
                pass

    threading.Thread(target=read, daemon=True).start()


def frame(payload: bytes, opcode: int = TEXT, *, compressed: bool = False) -> bytes:
    """Return a WebSocket frame of a client, with a mask of zeros."""
    first = 0x80 | (0x40 if compressed else 0) | opcode
    if len(payload) < 126:
        head = struct.pack("!BB", first, 0x80 | len(payload))
    elif len(payload) < 1 << 16:
        head = struct.pack("!BBH", first, 0x80 | 126, len(payload))
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, len(payload))
    return head + bytes(4) + payload


def deflated(data: bytes) -> bytes:
    """Return the payload of a compressed frame."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


class WebSocket:
    """A WebSocket whose frames the attacker writes itself."""

    def __init__(
        self,
        attacker: Attacker,
        *,
        deflate: bool = False,
        receive_buffer: int | None = None,
        **headers: object,
    ) -> None:
        """Shake hands.

        Args:
          attacker: knows the target.
          deflate: ask for permessage-deflate.
          receive_buffer: of the connection, in bytes.
          headers: more of them.
        Raises:
          OSError: no connection, or no handshake.
        """
        self.connection = attacker.connect(receive_buffer)
        offer = {"sec_websocket_extensions": "permessage-deflate"} if deflate else {}
        self.connection.sendall(
            attacker.head(
                "GET /ws",
                upgrade="websocket",
                connection="Upgrade",
                sec_websocket_version=13,
                sec_websocket_key=base64.b64encode(os.urandom(16)).decode(),
                **offer,
                **headers,
            )
        )
        self.head = receive(self.connection, 10, re.compile(rb"\r\n\r\n"))
        if statuses_of(self.head) != [101]:
            self.connection.close()
            raise ConnectionError(f"no handshake: {self.head[:100]!r}")

    @property
    def deflates(self) -> bool:
        """Whether the platform takes compressed frames."""
        return b"permessage-deflate" in self.head.lower()

    def send(self, message: dict[str, Any]) -> None:
        """Send a JSON message."""
        self.connection.sendall(frame(json.dumps(message, separators=(",", ":")).encode()))

    def close(self) -> None:
        """Hang up."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_all(connections: Sequence[socket.socket | WebSocket]) -> None:
    """Hang up all connections."""
    for connection in connections:
        connection.close()
