"""A WebSocket client that may break every rule."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from typing import Any

#: Headers of a handshake, in order.
HANDSHAKE = {
    "Host": "here",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
}
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def connect(address: str, receive_buffer: int | None = None) -> socket.socket:
    """Open a connection to `host:port`."""
    host, _, port = address.partition(":")
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(20)
    sock.connect((host, int(port)))
    return sock


def request(
    headers: dict[str, str | None], method: str = "GET", path: str = "/ws", more: str = ""
) -> bytes:
    """Return a handshake with other headers; None leaves one out, and `more` is added as it is."""
    lines = [f"{name}: {value}" for name, value in (HANDSHAKE | headers).items() if value]
    text = "\r\n".join([f"{method} {path} HTTP/1.1", *lines]) + "\r\n" + more + "\r\n"
    return text.encode("latin-1")


def frame(
    payload: bytes = b"",
    opcode: int = TEXT,
    *,
    fin: bool = True,
    reserved: int = 0,
    masked: bool = True,
    declared: int | None = None,
) -> bytes:
    """Return a frame of a client, masked with zeros.

    Args:
      payload: the payload.
      opcode: kind of the frame; 0 continues a message.
      fin: whether it ends its message.
      reserved: the three reserved bits.
      masked: whether it is masked, as it must be.
      declared: the length that its head declares; by default the payload's.
    """
    size = len(payload) if declared is None else declared
    first, mask = fin << 7 | reserved << 4 | opcode, masked << 7
    if size < 126:
        head = struct.pack("!BB", first, mask | size)
    elif size < 65_536:
        head = struct.pack("!BBH", first, mask | 126, size)
    else:
        head = struct.pack("!BBQ", first, mask | 127, size)
    return head + (bytes(4) if masked else b"") + payload


class RawSocket:
    """A WebSocket after its handshake."""

    def __init__(
        self,
        address: str,
        headers: dict[str, str | None] | None = None,
        receive_buffer: int | None = None,
    ) -> None:
        self.sock = connect(address, receive_buffer)
        self._buffer = b""
        self.sock.sendall(request(headers or {}))
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        self.head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        assert self.head.startswith(b"HTTP/1.1 101 "), self.head

    def __enter__(self) -> RawSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *frames: bytes) -> None:
        """Send frames as they are."""
        self.sock.sendall(b"".join(frames))

    def say(self, **message: Any) -> None:
        """Send a message of JSON."""
        self.send(frame(json.dumps(message).encode()))

    def receive(self) -> tuple[int, bytes]:
        """Return the opcode and the payload of the next frame."""
        self._need(2)
        opcode, size, start = self._buffer[0] & 15, self._buffer[1] & 127, 2
        if size >= 126:
            start = 4 if size == 126 else 10
            self._need(start)
            size = int.from_bytes(self._buffer[2:start], "big")
        self._need(start + size)
        payload = self._buffer[start : start + size]
        self._buffer = self._buffer[start + size :]
        return opcode, payload

    def hear(self) -> Any:
        """Return the next message of JSON, and answer the pings before it."""
        opcode, payload = self.receive()
        while opcode == PING:
            self.send(frame(payload, PONG))
            opcode, payload = self.receive()
        assert opcode == TEXT, (opcode, payload)
        return json.loads(payload)

    def closing(self) -> tuple[int, str]:
        """Skip to the close frame and return its code and reason."""
        while True:
            opcode, payload = self.receive()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big"), payload[2:].decode()

    def _need(self, size: int) -> None:
        while len(self._buffer) < size:
            self._more()

    def _more(self) -> None:
        data = self.sock.recv(65_536)
        if not data:
            raise EOFError("the server has closed the connection")
        self._buffer += data


def random_key() -> str:
    """Return a key as a client must make it."""
    return base64.b64encode(os.urandom(16)).decode()
