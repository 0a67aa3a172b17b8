"""The frames of one WebSocket: messages that arrive, within limits, and what is sent.

One thread reads and one writes. Nothing is read while a message is handled, so a client that sends
too much fills its own buffers and not ours.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import CloseConnection, Event, Message, Ping, TextMessage
from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits
from wsproto.utilities import LocalProtocolError

from web.calls import turns
from web.sockets.budget import Share

#: Bytes that are read or sent at once.
_CHUNK = 65_536
#: How long a greenlet may keep the others waiting, in seconds.
_TURN_S = 0.002
#: A sender that is too fast is read later, in pauses of at least this many seconds.
_PAUSE_S = 0.01
#: States of a TCP connection that its peer has ended: CLOSE and CLOSE_WAIT, as Linux numbers them.
_HUNG_UP = (7, 8)
_NO_LINGER = struct.pack("ii", 1, 0)


class Closed(Exception):
    """The socket is closed, or about to be."""


class Violation(Exception):
    """The client has broken the protocol or a limit; `code` is the close code that says so."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """What one client may do."""

    max_message_bytes: int
    max_queued_messages: int
    max_queued_bytes: int
    messages_per_s: float
    ping_interval_s: float
    message_timeout_s: float
    send_timeout_s: float


class Wire:
    """Reads and writes the frames of one socket."""

    def __init__(self, sock: socket.socket, share: Share, limits: Limits) -> None:
        """Take over a socket after its handshake.

        Args:
          sock: the socket.
          share: counts the bytes of the message that is arriving.
          limits: what the client may do.
        """
        self._sock = sock
        self._share = share
        self._limits = limits
        self._heads = _Heads(limits.max_message_bytes)
        self._connection = Connection(ConnectionType.SERVER, [self._heads])
        self._pace = _Pace(limits.messages_per_s)
        self._turn = _Turn()
        #: The part of a message that has arrived, and when its first bytes came.
        self._message = bytearray()
        self._begun_at: float | None = None
        self._fragmented = False
        self._ping_due = time.monotonic() + limits.ping_interval_s
        self._pinged_at = -math.inf
        #: When the client last sent bytes, or took a part of a message: it cannot answer within.
        self._alive_at = time.monotonic()
        #: The answer to the newest ping; older ones need none (RFC 6455, 5.5.3).
        self._pong: Event | None = None
        self._ping: Event | None = None
        #: Answer to the client's close frame.
        self.farewell: Event | None = None

    # -- Read --------------------------------------------------------------------------------------

    def receive(self, until: float) -> bytes | bytearray | None:
        """Return the next message, or None if there is none yet: call again.

        Args:
          until: latest return while nothing comes, on the clock of `time.monotonic`.
        Raises:
          Closed: the client has closed the socket, or was closed for what it holds.
          Violation: the client has broken the protocol or a limit.
        """
        message = self._parse()
        if message is None:
            self._read(until)
            message = self._parse()
        if message is not None:
            self._begun_at = None
        return message

    def drain(self) -> None:
        """Discard what comes until the connection ends; its end must be near."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(self._limits.send_timeout_s)
            while self._sock.recv(_CHUNK):
                self._turn.take()

    def discard(self) -> None:
        """Forget the part of a message that has arrived."""
        self._share.give(len(self._message))
        self._message = bytearray()

    def _parse(self) -> bytes | bytearray | None:
        """Handle the frames that have arrived, up to the end of a message."""
        for event in self._connection.events():
            if self._pace.take(self._heads.taken()) and self.has_hung_up():
                raise Closed  # Nobody waits for answers to the rest of what it sent.
            self._turn.take()
            if isinstance(event, Message):
                message = self._joined(event)
                if message is not None:
                    return message
            elif isinstance(event, Ping):
                self._pong = event.response()
            elif isinstance(event, CloseConnection):
                self._end(event)
            if not self._fragmented:
                self._begun_at = None
        return None

    def _joined(self, event: Message[Any]) -> bytes | bytearray | None:
        """Return the message that a piece completes."""
        piece = event.data.encode() if isinstance(event, TextMessage) else event.data
        self._fragmented = not event.message_finished
        if self._fragmented or self._message:
            self._share.take(len(piece), patient=True)
            if self._share.evicted:
                raise Closed
            self._message += piece
            piece = self._message
        if self._fragmented:
            return None
        self.discard()
        return piece

    def _end(self, event: CloseConnection) -> None:
        if self._connection.state is ConnectionState.REMOTE_CLOSING:
            self.farewell = event.response()
        elif self._connection.state is ConnectionState.OPEN:
            # wsproto found what is wrong.
            reason = event.reason or ""
            if self._heads.too_big:
                reason = f"the message is larger than {self._limits.max_message_bytes} bytes"
            raise Violation(event.code, reason)
        raise Closed

    def _read(self, until: float) -> None:
        """Wait for bytes, and see that the client is there."""
        now, limits = time.monotonic(), self._limits
        if now >= self._ping_due and self._alive_at > self._pinged_at:
            self._ping, self._pinged_at = Ping(), now
            self._ping_due = now + limits.ping_interval_s
            return
        ends = [until, self._ping_due]
        if self._begun_at is not None:
            ends.append(self._begun_at + limits.message_timeout_s)
        # What has come is read even where the time is over.
        self._sock.settimeout(max(min(ends) - now, 0.001))
        try:
            data = self._sock.recv(_CHUNK)
        except TimeoutError:
            self._check_times()
            return
        except OSError:
            raise Closed from None
        if not data:
            raise Closed
        self._share.progress()
        self._alive_at = time.monotonic()
        if self._begun_at is None:
            self._begun_at = self._alive_at
        try:
            self._connection.receive_data(data)
        except LocalProtocolError:
            raise Closed from None

    def _check_times(self) -> None:
        now, limits = time.monotonic(), self._limits
        if self._begun_at is not None and now >= self._begun_at + limits.message_timeout_s:
            raise Violation(
                CloseReason.POLICY_VIOLATION,
                f"a message was not complete after {limits.message_timeout_s:g} s",
            )
        if now >= self._ping_due and self._alive_at <= self._pinged_at:
            raise Violation(CloseReason.POLICY_VIOLATION, "no answer to a ping")

    # -- Write -------------------------------------------------------------------------------------

    @property
    def answers(self) -> bool:
        """Whether a ping or a pong waits to be sent."""
        return self._pong is not None or self._ping is not None

    def send_answers(self) -> None:
        """Send the ping and the pong that wait.

        Raises:
          OSError: as `send`.
        """
        events = [event for event in (self._pong, self._ping) if event is not None]
        self._pong = self._ping = None
        for event in events:
            with contextlib.suppress(LocalProtocolError):
                self._send(self._connection.send(event))

    def send(self, text: bytes) -> None:
        """Send a message, without a copy of it.

        Raises:
          OSError: the connection is lost, or the client takes nothing in time.
        """
        size = len(text)
        if size < 126:
            head = struct.pack("!BB", 0x81, size)
        elif size < 65_536:
            head = struct.pack("!BBH", 0x81, 126, size)
        else:
            head = struct.pack("!BBQ", 0x81, 127, size)
        if size < _CHUNK:
            self._send(head + text)
        else:
            self._send(head)
            self._send(text)
        self._turn.take()

    def close(self, code: int, reason: str) -> None:
        """Send a close frame; nothing can be sent after it.

        Raises:
          OSError: as `send`.
        """
        event = self.farewell or CloseConnection(code, reason)
        with contextlib.suppress(LocalProtocolError):
            self._send(self._connection.send(event))

    def has_hung_up(self) -> bool:
        """Return whether the client has ended the connection, even behind bytes that wait."""
        state = getattr(socket, "TCP_INFO", None)
        if state is None:
            return False  # Only Linux tells.
        try:
            return self._sock.getsockopt(socket.IPPROTO_TCP, state, 1)[0] in _HUNG_UP
        except OSError:
            return True

    def abort(self, *, discard: bool) -> None:
        """End the connection; whoever reads or writes it notices.

        Args:
          discard: also drop what the kernel still has to send.
        """
        with contextlib.suppress(OSError):
            if discard:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self._sock.shutdown(socket.SHUT_RDWR)

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._sock.settimeout(self._limits.send_timeout_s)
            view = view[self._sock.send(view[:_CHUNK]) :]
            self._share.progress()
            if view:
                self._alive_at = time.monotonic()


class _Heads(Extension):
    """Sees the head of each frame, before its payload is read."""

    name = "heads"

    def __init__(self, most: int) -> None:
        self._most = most
        self._message_bytes = 0
        self._frames = 0
        self.too_big = False

    def enabled(self) -> bool:
        return True

    def offer(self) -> bool:
        return False

    def frame_inbound_header(
        self,
        proto: FrameDecoder | FrameProtocol,
        opcode: Opcode,
        rsv: RsvBits,
        payload_length: int,
    ) -> CloseReason | RsvBits:
        self._frames += 1
        if not opcode.iscontrol():
            before = self._message_bytes if opcode is Opcode.CONTINUATION else 0
            self._message_bytes = before + payload_length
            self.too_big = self._message_bytes > self._most
        if self.too_big:
            return CloseReason.MESSAGE_TOO_BIG
        return RsvBits(False, False, False)

    def taken(self) -> int:
        """Return the number of frames since the last call."""
        frames, self._frames = self._frames, 0
        return frames


class _Pace:
    """A token bucket that holds the tokens of one second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = rate
        self._filled_at = time.monotonic()

    def take(self, count: int) -> bool:
        """Take tokens; where there are too few, sleep until there are enough.

        Returns:
          whether it has slept.
        """
        self._tokens -= count
        if self._tokens > 0:
            return False
        now = time.monotonic()
        filled = self._tokens + (now - self._filled_at) * self._rate
        self._tokens, self._filled_at = min(filled, self._rate), now
        missing_s = -self._tokens / self._rate
        if missing_s < _PAUSE_S:
            return False
        time.sleep(missing_s)
        return True


class _Turn:
    """Lets other greenlets run when this one has kept them waiting for long enough."""

    def __init__(self) -> None:
        self._until = 0.0

    def take(self) -> None:
        """Go on, or first let the others run."""
        if time.monotonic() > self._until:
            turns.pause()
            self._until = time.monotonic() + _TURN_S
