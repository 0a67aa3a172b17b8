"""WebSockets that are wrong in one way: handshakes, frames and messages."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz.case import Case, Ending
from tests.fuzz.contents import RAW_VALUES, VALUES
from tests.fuzz.seeds import UNKNOWN_TASK

#: Asks for a last answer, which shows that the socket is alive.
PING = b'{"type":"ping","id":"last"}'

MESSAGES: list[dict[str, Any]] = [
    {"type": "submit", "id": 1, "model": "echo", "inputs": {"text": "a"}},
    {"type": "submit", "id": 1, "model": "echo", "inputs": {"text": "a"}, "idempotency_key": "k"},
    {"type": "subscribe", "task_id": UNKNOWN_TASK},
    {"type": "subscribe", "task_ids": [UNKNOWN_TASK, "x"]},
    {"type": "unsubscribe", "task_ids": [UNKNOWN_TASK]},
    {"type": "cancel", "id": 1, "task_id": UNKNOWN_TASK},
    {"type": "ping", "id": 1},
]

#: Lines of a handshake that replace the right ones of the same name, or are added.
ODD_LINES = [
    b"Sec-WebSocket-Version: 8", b"Sec-WebSocket-Version: \xb2", b"Sec-WebSocket-Version: ",
    b"Sec-WebSocket-Key: x", b"Sec-WebSocket-Key: ", b"Sec-WebSocket-Key: \xff",
    b"Sec-WebSocket-Key: " + b"a" * 3000, b"Upgrade: websocket, h2c", b"Upgrade: WebSocket",
    b"Upgrade: h2c", b"Upgrade: \xff", b"Connection: keep-alive", b"Connection: Upgrade, \xff",
    b"Connection: ", b"Sec-WebSocket-Protocol: ,,,", b"Sec-WebSocket-Protocol: \xff",
    b"Sec-WebSocket-Protocol: a, a", b"Sec-WebSocket-Extensions: ;;;=",
    b"Sec-WebSocket-Extensions: \xff",
    b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=99",
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=x",
    b"Sec-WebSocket-Extensions: permessage-deflate, permessage-deflate", b"Content-Length: 5",
    b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Origin: https://evil.example",
    b"Origin: \xff", b"Sec-WebSocket-Extensions: " + b"a;" * 4000,
]  # fmt: skip

STARTS = [
    b"GET /ws HTTP/1.1", b"GET /v1/ws HTTP/1.1", b"GET /ws/%ff HTTP/1.1",
    b"GET /ws/x?wait=nan HTTP/1.1", b"GET /ws/x?wait=\xff HTTP/1.1", b"POST /ws HTTP/1.1",
    b"GET /ws HTTP/1.0", b"HEAD /ws HTTP/1.1", b"GET /ws/" + UNKNOWN_TASK.encode() + b" HTTP/1.1",
    b"GET /wsx HTTP/1.1", b"GET /health/live HTTP/1.1", b"GET /ws/ HTTP/1.1",
    b"GET /ws?a=\xff HTTP/1.1", b"OPTIONS /ws HTTP/1.1",
]  # fmt: skip


def frame(
    payload: bytes,
    opcode: int = 1,
    *,
    fin: bool = True,
    reserved: int = 0,
    mask: bytes | None = b"\x11\x22\x33\x44",
    length: bytes | None = None,
) -> bytes:
    """Return a client's frame.

    Args:
      payload: the content, not yet masked.
      opcode: 0 to 15.
      fin: whether it ends its message.
      reserved: the three reserved bits, 0 to 7.
      mask: four bytes, or None for a frame that is not masked.
      length: the bytes that say how long it is, with the mask bit, in place of the right ones.
    """
    masked = 0x80 if mask is not None else 0
    size = len(payload)
    if length is None:
        if size < 126:
            length = struct.pack("!B", masked | size)
        elif size < 65_536:
            length = struct.pack("!BH", masked | 126, size)
        else:
            length = struct.pack("!BQ", masked | 127, size)
    first = bytes([(0x80 if fin else 0) | reserved << 4 | opcode])
    if mask is None:
        return first + length + payload
    key = (mask * (size // 4 + 1))[:size]
    content = (int.from_bytes(payload) ^ int.from_bytes(key)).to_bytes(size)
    return first + length + mask + content


def handshake(host: bytes, *lines: bytes, start: bytes = STARTS[0]) -> bytes:
    """Return the request that opens a socket; lines replace the right ones of the same name."""
    right = [
        b"Host: " + host,
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        b"Sec-WebSocket-Version: 13",
    ]
    names = {line.partition(b":")[0] for line in lines}
    kept = [line for line in right if line.partition(b":")[0] not in names]
    return b"\r\n".join([start, *kept, *lines, b"", b""])


#: Frames after which a server must end the connection (RFC 6455, sections 5 to 8).
BROKEN_FRAMES = {
    "reserved bit 1": frame(PING, reserved=4),
    "reserved bit 2": frame(PING, reserved=2),
    "reserved bit 3": frame(PING, reserved=1),
    "reserved data opcode": frame(PING, 3),
    "reserved control opcode": frame(b"", 11),
    "not masked": frame(PING, mask=None),
    "control frame in fragments": frame(b"a", 9, fin=False),
    "long control frame": frame(b"a" * 126, 9),
    "continuation of nothing": frame(b"a", 0),
    "message within a message": frame(b'{"a', fin=False) + frame(PING),
    "length over 63 bits": frame(b"", length=b"\xff" + b"\xff" * 8),
    "length over the limit": frame(b"", length=b"\xff" + struct.pack("!Q", 2**40)),
    "long form of a short length": frame(PING, length=struct.pack("!BH", 0xFE, len(PING))),
    "text that is not UTF-8": frame(b'{"type":"\xff"}'),
    "surrogates in a text": frame(b'{"type":"\xed\xa0\x80"}'),
    "UTF-8 cut at the end": frame(b"\xc3"),
    "not UTF-8 in a fragment": frame(b"\xc3", fin=False) + frame(b"(", 0),
    "close of one byte": frame(b"\x03", 8),
    "close code 0": frame(struct.pack("!H", 0), 8),
    "close code 999": frame(struct.pack("!H", 999), 8),
    "close code 1005": frame(struct.pack("!H", 1005), 8),
    "close code 1006": frame(struct.pack("!H", 1006), 8),
    "close code 5000": frame(struct.pack("!H", 5000), 8),
    "reason that is not UTF-8": frame(struct.pack("!H", 1000) + b"\xff", 8),
    "close": frame(struct.pack("!H", 1000) + b"bye", 8),
    "close without a code": frame(b"", 8),
    "HTTP": b"GET /v1/models/smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
}


def odd_handshake(rng: Random, host: bytes) -> Case:
    """Open a socket in an odd way; a server may refuse it, but in an orderly way."""
    lines = rng.sample(ODD_LINES, rng.choice([0, 1, 1, 2]))
    start = rng.choice([STARTS[0], rng.choice(STARTS)])
    wire = handshake(host, *lines, start=start)
    method = start.partition(b" ")[0].decode()
    return Case("socket: odd handshake", (wire,), (method,), socket=True)


def short_handshake(rng: Random, host: bytes) -> Case:
    """Leave a line of the handshake out."""
    lines = handshake(host).split(b"\r\n")
    del lines[rng.randrange(1, len(lines) - 2)]
    return Case("socket: short handshake", (b"\r\n".join(lines),), socket=True)


def broken_frame(rng: Random, host: bytes) -> Case:
    """Send a frame after which the connection must end."""
    name, wire = rng.choice(list(BROKEN_FRAMES.items()))
    return _case(name, host, wire, closes=True, ending=Ending.WAIT)


def message(rng: Random, host: bytes) -> Case:
    """Send a message of which a member is wrong."""
    content = dict(rng.choice(MESSAGES))
    key = rng.choice([*content, "new", "task_id", "task_ids", "id"])
    if rng.random() < 0.2:
        content.pop(key, None)
        text = json.dumps(content).encode()
    elif rng.random() < 0.4:
        content[key] = "raw"
        text = json.dumps(content).encode().replace(b'"raw"', rng.choice(RAW_VALUES))
    else:
        content[key] = rng.choice(VALUES)
        text = json.dumps(content).encode()
    opcode = rng.choice([1, 1, 1, 2])
    if opcode == 1 and not _is_text(text):
        return _case("text that is not UTF-8", host, frame(text), closes=True, ending=Ending.WAIT)
    return _case("message", host, _fragmented(rng, text, opcode) + frame(PING), survives=True)


def controls(rng: Random, host: bytes) -> Case:
    """Send control frames between the fragments of a message, which is allowed."""
    text = json.dumps(rng.choice(MESSAGES)).encode()
    cut = rng.randrange(len(text))
    between = [frame(rng.randbytes(rng.randint(0, 125)), rng.choice([9, 10])) for _ in range(5)]
    wire = frame(text[:cut], fin=False) + b"".join(between) + frame(text[cut:], 0) + frame(PING)
    return _case("control frames", host, wire, survives=True)


def cut_off(rng: Random, host: bytes) -> Case:
    """End or reset a socket somewhere in its frames."""
    wire = b"".join(frame(json.dumps(message).encode()) for message in MESSAGES)
    ending = rng.choice([Ending.HALF_CLOSE, Ending.RESET])
    return _case("cut off", host, wire[: rng.randrange(len(wire))], ending=ending)


def noise(rng: Random, host: bytes) -> Case:
    """Send random bytes in place of frames."""
    return _case("noise", host, rng.randbytes(rng.choice([1, 20, 3000])))


def many(rng: Random, host: bytes) -> Case:
    """Send many small messages at once, and read all answers."""
    content = rng.choice(
        [b'{"type":"ping","id":1}', b"", b"[]", b'{"type":"cancel","task_ids":[]}']
    )
    wire = frame(content, rng.choice([1, 2])) * rng.choice([10, 200])
    return _case("many messages", host, wire + frame(PING), survives=True)


def _case(
    name: str,
    host: bytes,
    wire: bytes,
    *,
    closes: bool = False,
    survives: bool = False,
    ending: Ending = Ending.HALF_CLOSE,
) -> Case:
    return Case(
        f"socket: {name}",
        (handshake(host), wire),
        ending=Ending.WAIT if survives else ending,
        closes=closes,
        socket=True,
        survives=survives,
    )


def _fragmented(rng: Random, text: bytes, opcode: int) -> bytes:
    """Return a message in one frame, or in several."""
    if len(text) < 3 or rng.random() < 0.6:
        return frame(text, opcode)
    cut = rng.randrange(1, len(text))
    return frame(text[:cut], opcode, fin=False) + frame(b"", 0, fin=False) + frame(text[cut:], 0)


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


MUTATIONS: list[Callable[[Random, bytes], Case]] = [
    odd_handshake, odd_handshake, short_handshake, broken_frame, broken_frame, broken_frame,
    message, message, controls, cut_off, noise, many,
]  # fmt: skip
