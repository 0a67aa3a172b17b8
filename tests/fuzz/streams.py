"""Valid requests that arrive oddly: several at once, in pieces, cut off, damaged on the way."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.fuzz.case import Case, Ending
from tests.fuzz.heads import MARKER
from tests.fuzz.seeds import Request

#: Other protocols' first bytes, and none's.
STRANGERS = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 300,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET /health/live HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\r\n" * 2000, b"\n" * 5000, b"\0" * 5000, b"*1\r\n$4\r\nPING\r\n", b"SSH-2.0-fuzz\r\n",
    b"GET /\r\n", b"\r\n\r\nGET /health/live HTTP/1.1\r\nHost: a\r\n\r\n", b"A" * 100_000,
]  # fmt: skip


def pipelined(rng: Random, seed: Request, host: bytes) -> Case:
    """Send a request several times without waiting for the answers."""
    count = rng.choice([2, 5, 40] if seed.method == "GET" else [2, 3])
    return Case(
        "pipelined", (seed.encoded(host) * count,), (seed.method,) * count, ending=Ending.WAIT
    )


def closed_before(rng: Random, seed: Request, host: bytes) -> Case:
    """Ask for the marker behind a request that ends the connection."""
    wire = seed.with_header(b"Connection", b"close").encoded(host) + MARKER % host
    return Case("behind the last request", (wire,), (seed.method,), Ending.WAIT, closes=True)


def broken_behind(rng: Random, seed: Request, host: bytes) -> Case:
    """Send a broken request behind a good one."""
    broken = b"GET /health/live HTTP/1.1\r\nHost: %b\r\nX A: b\r\n\r\n" % host
    wire = seed.encoded(host) + broken + MARKER % host
    methods = (seed.method, "GET")
    return Case("broken behind a good one", (wire,), methods, Ending.WAIT, closes=True)


def pieces(rng: Random, seed: Request, host: bytes) -> Case:
    """Send a request in pieces, with pauses."""
    wire = seed.encoded(host)
    cuts = sorted(rng.randrange(1, len(wire)) for _ in range(rng.choice([1, 3, 12])))
    parts = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    return Case("in pieces", tuple(parts), (seed.method,), Ending.WAIT, gap_s=0.02)


def slow_bytes(rng: Random, seed: Request, host: bytes) -> Case:
    """Send the beginning of a request byte by byte, the rest at once."""
    wire = seed.encoded(host)
    slow = min(40, len(wire) - 1)
    parts = (*(wire[i : i + 1] for i in range(slow)), wire[slow:])
    return Case("byte by byte", parts, (seed.method,), Ending.WAIT, gap_s=0.01)


def cut_off(rng: Random, seed: Request, host: bytes) -> Case:
    """End or reset the connection somewhere in a request."""
    wire = seed.encoded(host)
    ending = rng.choice([Ending.HALF_CLOSE, Ending.RESET])
    part = wire[: rng.randrange(len(wire))]
    return Case(f"cut off: {ending.value}", (part,), (seed.method,), ending)


def gone(rng: Random, seed: Request, host: bytes) -> Case:
    """Reset the connection right behind a whole request."""
    return Case("gone", (seed.encoded(host),), (seed.method,), Ending.RESET)


def damaged(rng: Random, seed: Request, host: bytes) -> Case:
    """Flip, insert, remove or repeat bytes of a request."""
    wire = bytearray(seed.encoded(host))
    for _ in range(rng.choice([1, 1, 3, 10])):
        position = rng.randrange(len(wire))
        change = rng.choice(["flip", "insert", "remove", "repeat"])
        if change == "flip":
            wire[position] ^= 1 << rng.randrange(8)
        elif change == "insert":
            wire[position:position] = rng.choice(
                [b"\0", b"\r", b"\n", b"\r\n", b" ", b"\xff", b":"]
            )
        elif change == "remove" and len(wire) > 10:
            del wire[position : position + rng.randint(1, 4)]
        else:
            wire[position:position] = wire[position : position + 20]
    # Damage can make two or three requests of one.
    return Case("damaged", (bytes(wire),), (seed.method, "GET", "GET"))


def stranger(rng: Random, seed: Request, host: bytes) -> Case:
    """Speak another protocol, or none."""
    wire = rng.choice([*STRANGERS, rng.randbytes(rng.choice([1, 100, 5000]))])
    return Case("another protocol", (wire,), ("GET", "GET"))


MUTATIONS: list[Callable[[Random, Request, bytes], Case]] = [
    pipelined, closed_before, broken_behind, pieces, slow_bytes, cut_off, cut_off, gone, damaged,
    damaged, stranger,
]  # fmt: skip
