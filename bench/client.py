"""HTTP and WebSocket connections for load, with as little work per request as asyncio allows.

A general client, such as httpx, would take most of the core that it shares with the server.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import struct
from typing import cast

#: A mask of zeros leaves the payload as it is, which saves a pass over it.
_MASK = bytes(4)
_FINAL, _TEXT, _CLOSE, _PING, _PONG = 0x80, 0x1, 0x8, 0x9, 0xA
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


class ProtocolError(Exception):
    """The server hung up, or its answer cannot be parsed."""


class _Connection(asyncio.Protocol):
    """A connection with one waiter at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._wake()

    def write(self, data: bytes) -> None:
        if not self.is_open or self._transport is None:
            raise ProtocolError("the connection is closed")
        self._transport.write(data)

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _more(self) -> None:
        """Wait for more data."""
        if not self.is_open:
            raise ProtocolError("the server has closed the connection")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Http(_Connection):
    """A keep-alive connection with one request at a time."""

    @classmethod
    async def connect(cls, port: int) -> Http:
        """Connect to a server on this machine."""
        _, protocol = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return protocol

    async def call(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; return the status and the body of its answer.

        Raises:
          ProtocolError: the connection was cut, or the answer has no length.
        """
        self.write(request)
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._more()
        status = int(self._buffer[9:12])
        found = _LENGTH.search(self._buffer, 0, end)
        size = None if found is None else int(found[1])
        if size is None and not _CHUNKED.search(self._buffer, 0, end):
            raise ProtocolError(f"an answer without a length: {bytes(self._buffer[:200])!r}")
        del self._buffer[: end + 4]
        if size is not None:
            return status, await self._take(size)
        chunks = []
        while size := int(await self._line(), 16):
            chunks.append(await self._take(size))
            await self._line()
        await self._line()
        return status, b"".join(chunks)

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            await self._more()
        return (await self._take(end + 2))[:-2]


def post(path: str, body: bytes) -> bytes:
    """Return a request with a JSON body."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def get(path: str) -> bytes:
    """Return a request without a body."""
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


class WebSocket(_Connection):
    """A WebSocket for JSON messages."""

    @classmethod
    async def connect(cls, port: int, path: str) -> WebSocket:
        """Connect to a server on this machine.

        Raises:
          ProtocolError: the server does not switch to WebSockets.
        """
        _, socket = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        try:
            await socket._shake_hands(path)
        except BaseException:
            socket.close()
            raise
        return socket

    async def _shake_hands(self, path: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self.write(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._more()
        if not self._buffer.startswith(b"HTTP/1.1 101"):
            raise ProtocolError(f"not a WebSocket: {bytes(self._buffer[:200])!r}")
        del self._buffer[: end + 4]

    def send(self, message: bytes) -> None:
        """Send one text message."""
        self.write(_frame(_TEXT, message))

    async def receive(self) -> bytes:
        """Return the next message; answer pings that arrive before it.

        Raises:
          ProtocolError: the server closed the socket, or sent a fragment.
        """
        while True:
            frame = self._next_frame()
            if frame is None:
                await self._more()
                continue
            kind, payload = frame
            if kind == _FINAL | _TEXT:
                return payload
            if kind == _FINAL | _PING:
                self.write(_frame(_PONG, payload))
            elif kind == _FINAL | _CLOSE:
                raise ProtocolError("the server has closed the socket")
            elif kind != _FINAL | _PONG:
                raise ProtocolError(f"an unexpected frame: {kind:#x}")

    def _next_frame(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        start = 2 if len(buffer) < 2 else {126: 4, 127: 10}.get(buffer[1], 2)
        if len(buffer) < start:
            return None
        size = buffer[1] if start == 2 else int.from_bytes(buffer[2:start])
        stop = start + size
        if len(buffer) < stop:
            return None
        kind, payload = buffer[0], bytes(buffer[start:stop])
        del buffer[:stop]
        return kind, payload


def _frame(kind: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", _FINAL | kind, 0x80 | size)
    elif size < 65536:
        head = struct.pack("!BBH", _FINAL | kind, 0xFE, size)
    else:
        head = struct.pack("!BBQ", _FINAL | kind, 0xFF, size)
    return head + _MASK + payload
