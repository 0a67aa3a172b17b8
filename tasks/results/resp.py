"""The part of Redis' protocol (RESP3) that a subscribed connection speaks.

Each waiting call costs two confirmations and a message. redis-py's reader takes ten times as long
for them, which shows in how many calls a process can serve.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import redis

Reply = int | bytes | None | list["Reply"]

#: Confirmations of SUBSCRIBE and UNSUBSCRIBE. Nobody waits for them, so they are skipped at once.
_CONFIRMATIONS = re.compile(
    rb"(?:>3\r\n\$(?:9\r\nsubscribe|11\r\nunsubscribe)\r\n\$\d+\r\n[^\r]*\r\n:\d+\r\n)+"
)
#: A message up to its payload: the channel, and the size of what follows.
_MESSAGE = re.compile(rb">3\r\n\$7\r\nmessage\r\n\$\d+\r\n([^\r]*)\r\n\$(\d+)\r\n")

_NEWLINE = b"\r\n"
_ARRAYS = b">*~"
_BULKS = b"$="


def pack(command: bytes, arguments: Iterable[bytes]) -> bytes:
    """Return a command as Redis reads it."""
    words = [command, *arguments]
    body = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
    return b"*%d\r\n%b" % (len(words), body)


class ReplyReader:
    """Reads replies and pushed messages from a stream."""

    #: Bytes asked for at once.
    CHUNK = 65_536

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        """Store where the bytes come from.

        Args:
          receive: a socket's `recv`; blocks, and returns nothing at the end of the stream.
        """
        self._receive = receive
        self._buffer = bytearray()
        #: Where the next reply begins.
        self._at = 0

    def read(self) -> Reply:
        """Return the next reply; a pushed message is a list, and most confirmations are left out.

        Raises:
          redis.ConnectionError: the stream has ended.
          redis.ResponseError: Redis refused a command.
        """
        if skipped := _CONFIRMATIONS.match(self._buffer, self._at):
            self._at = skipped.end()
        if found := _MESSAGE.match(self._buffer, self._at):
            self._at = found.end()
            channel, size = found.groups()
            return [b"message", bytes(channel), self._bulk(int(size))]
        return self._read()

    def _read(self) -> Reply:
        kind, rest = self._line()
        if kind in _ARRAYS:
            return [self._read() for _ in range(int(rest))]
        if kind in _BULKS:
            return self._bulk(int(rest))
        if kind == b":":
            return int(rest)
        if kind == b"_":
            return None
        if kind == b"+":
            return rest
        raise redis.ResponseError((kind + rest).decode(errors="replace"))

    def _line(self) -> tuple[bytes, bytes]:
        while (end := self._buffer.find(_NEWLINE, self._at)) < 0:
            self._fill()
        at, self._at = self._at, end + 2
        return bytes(self._buffer[at : at + 1]), bytes(self._buffer[at + 1 : end])

    def _bulk(self, size: int) -> bytes:
        while len(self._buffer) < self._at + size + 2:
            self._fill()
        at, self._at = self._at, self._at + size + 2
        return bytes(self._buffer[at : at + size])

    def _fill(self) -> None:
        # What was read is dropped only now, so once for many replies.
        del self._buffer[: self._at]
        self._at = 0
        data = self._receive(self.CHUNK)
        if not data:
            raise redis.ConnectionError("Redis has closed the connection")
        self._buffer += data
