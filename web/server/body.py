"""The body of a request, read from its connection as the framing says, and not a byte further.

gunicorn's own readers take chunk extensions and trailers of any length, and go on after a body
whose framing is broken: what followed would be taken for a new request.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

from inferno.errors import (
    InfernoError,
    InvalidRequest,
    PayloadTooLarge,
    RequestError,
    ServerBusy,
)
from web.calls import turns
from web.server.connection import READ_BYTES, Connection, Phase, TimedOut

#: Largest line of a chunk's size with its extensions, and largest trailer section, in bytes.
LINE_BYTES = 512
TRAILER_BYTES = 8_192
#: Chunks of one body. Each costs a few microseconds, whatever its size.
MOST_CHUNKS = 100_000
#: Bytes of a body that nobody reads which are skipped to keep the connection.
SKIPPED_BYTES = 65_536


_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t\x20-\x7e\x80-\xff]*")
#: Fields that may not be in a trailer; RFC 9110 section 6.5.1.
_NOT_IN_TRAILERS = frozenset(
    (b"authorization", b"content-length", b"host", b"te", b"trailer", b"transfer-encoding")
)


class Refused(BaseException):
    """The rest of a request cannot be read; the worker says why and ends the connection.

    It passes through Flask, which handles exceptions only: the answer is the same on all ways, and
    it is cheap where a thousand clients leave at once.
    """

    def __init__(self, error: InfernoError) -> None:
        super().__init__(error)
        self.error = error


class Body(io.RawIOBase):
    """A request's body, as WSGI's `wsgi.input`."""

    def __init__(self, connection: Connection, size: int | None, most: int) -> None:
        """Prepare to read; nothing is read yet.

        Args:
          connection: the client's connection; its buffer begins with the body.
          size: bytes of the body; None if it comes in chunks.
          most: bytes that the chunks of a body may have together.
        """
        self.connection = connection
        self._chunked = size is None
        #: Bytes that are left, of the body or of the current chunk.
        self._left = size or 0
        self._chunks = self._received = 0
        self._most = self._room = most
        #: Whether the whole body was read.
        self.finished = size == 0
        self._broken = self._given_way = False

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, target: Any) -> int:
        """Read the bytes that come next into a buffer; return how many, 0 at the end.

        Raises:
          Refused: the client ends the body early or sends it too slowly, its framing is broken, its
            chunks are too large, or the process holds too much.
        """
        data = self._next(len(target))
        target[: len(data)] = data
        return len(data)

    def whole(self) -> bytes:
        """Return the rest of the body.

        Raises:
          Refused: as `readinto`.
        """
        pieces = []
        while piece := self._next(READ_BYTES):
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @property
    def ends_soon(self) -> bool:
        """Whether the next request probably follows after a few bytes."""
        return self.finished or not (self._broken or self._left > SKIPPED_BYTES)

    def skip(self) -> None:
        """Read the rest of a body that nobody wants, if it is short and well formed."""
        if not self.ends_soon:
            return
        skipped = 0
        with contextlib.suppress(Refused, OSError):
            while skipped <= SKIPPED_BYTES and (piece := self._next(SKIPPED_BYTES)):
                skipped += len(piece)

    def _next(self, most: int) -> bytes:
        """Return the bytes that come next, at most `most`; none at the end."""
        try:
            data = self._read(most)
        except (RequestError, ServerBusy) as exc:
            # What follows a broken body on its connection is not a request.
            self._broken = True
            raise Refused(exc) from None
        self.connection.breathe()
        if self.finished and self.connection.phase is not Phase.SERVING:
            self.connection.serve()
        if self.finished and not self._given_way:
            self._given_way = True
            turns.give_way(self._received)
        return data

    def _read(self, most: int) -> bytes:
        if self.finished or (self._chunked and not self._left and not self._open_chunk()):
            return b""
        if not self.connection.buffer:
            self._fill()
        data = self.connection.take(min(most, self._left))
        self._left -= len(data)
        self.connection.hold(len(data))
        self._received += len(data)
        if not self._left:
            self._end_piece()
        return data

    def _open_chunk(self) -> bool:
        """Read the size of the next chunk; return False at the end of the body."""
        self._chunks += 1
        if self._chunks > MOST_CHUNKS:
            raise InvalidRequest(f"expected at most {MOST_CHUNKS} chunks; send larger ones")
        line = self._line(LINE_BYTES)
        size = _CHUNK.fullmatch(line)
        if size is None:
            raise InvalidRequest(f"expected the size of a chunk in hexadecimal, got {line!r:.80}")
        self._left = int(size[1], 16)
        self._room -= self._left
        if self._room < 0:
            raise PayloadTooLarge(f"expected a body of at most {self._most} bytes")
        if not self._left:
            self._read_trailers()
        return self._left > 0

    def _end_piece(self) -> None:
        if not self._chunked:
            self.finished = True
        elif self._line(0):
            raise InvalidRequest("expected CR LF at the end of a chunk")

    def _read_trailers(self) -> None:
        """Skip the trailers: the platform knows none."""
        most = TRAILER_BYTES
        while line := self._line(most):
            field = _FIELD.fullmatch(line)
            if field is None or field[1].lower() in _NOT_IN_TRAILERS:
                raise InvalidRequest(f"expected a header field as a trailer, got {line!r:.80}")
            most -= len(line)
        self.finished = True

    def _line(self, most: int) -> bytes:
        """Return the next line without its CR LF.

        Raises:
          InvalidRequest: it is longer than `most` bytes, or ends with a bare line feed.
        """
        buffer = self.connection.buffer
        while (end := buffer.find(b"\r\n", 0, most + 2)) < 0:
            if len(buffer) >= most + 2:
                raise InvalidRequest(f"expected a line of at most {most} bytes between chunks")
            self._fill()
        line = self.connection.take(end + 2)[:-2]
        if b"\n" in line:
            raise InvalidRequest("expected lines that end with CR LF, got a bare line feed")
        return line

    def _fill(self) -> None:
        connection = self.connection
        if connection.phase is not Phase.BODY:
            connection.enter(Phase.BODY)
        if not connection.fill():
            if connection.cut:
                raise TimedOut("the request's body came too slowly")
            raise InvalidRequest("the request's body ended early")
