"""Bodies whose framing is wrong: lengths that lie, chunks that are malformed, compressions."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import replace
from random import Random

from tests.fuzz.case import Case, Ending
from tests.fuzz.heads import MARKER
from tests.fuzz.seeds import Request

#: Chunked bodies that are valid; `%b` is the chunk.
VALID_CHUNKS = {
    "plain": b"%x\r\n%b\r\n0\r\n\r\n",
    "extension": b"%x;a=b\r\n%b\r\n0\r\n\r\n",
    "zeros before the size": b"000%x\r\n%b\r\n0\r\n\r\n",
    "trailer": b"%x\r\n%b\r\n0\r\nX-Trailer: a\r\n\r\n",
}

#: Chunked bodies after which nobody knows where the next request begins.
BROKEN_CHUNKS = {
    "size with 0x": b"0x17\r\n",
    "negative size": b"-1\r\n",
    "signed size": b"+5\r\nabcde\r\n0\r\n\r\n",
    "size with an underscore": b"1_0\r\naaaaaaaaaaaaaaaa\r\n0\r\n\r\n",
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "size of letters": b"zz\r\n",
    "size of superscripts": b"\xb2\r\nab\r\n0\r\n\r\n",
    "space before the size": b" 5\r\nabcde\r\n0\r\n\r\n",
    "overflowing size": b"FFFFFFFFFFFFFFFF0\r\n",
    "huge size": b"7FFFFFFFFFFFFFFF\r\nabc",
    "endless size": b"0" * 70_000 + b"5\r\nabcde\r\n0\r\n\r\n",
    "LF after the size": b"5\nabcde\r\n0\r\n\r\n",
    "LF only": b"5\nabcde\n0\n\n",
    "CR after the size": b"5\rabcde\r\n0\r\n\r\n",
    "no end of a chunk": b"5\r\nabcde0\r\n\r\n",
    "wrong end of a chunk": b"2\r\nabXX",
    "LF after a chunk": b"5\r\nabcde\n0\r\n\r\n",
    "longer than its size": b"2\r\nabcde\r\n0\r\n\r\n",
    "LF in an extension": b"5;a\nb\r\nabcde\r\n0\r\n\r\n",
    "CR in an extension": b"5;a\rb\r\nabcde\r\n0\r\n\r\n",
    "NUL in an extension": b"5;a\x00\r\nabcde\r\n0\r\n\r\n",
    "endless extension": b"5;" + b"a" * 200_000 + b"\r\nabcde\r\n0\r\n\r\n",
    "length as a trailer": b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n",
    "coding as a trailer": b"2\r\n{}\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "Host as a trailer": b"2\r\n{}\r\n0\r\nHost: other.example\r\n\r\n",
    "trailer without a colon": b"2\r\n{}\r\n0\r\nnonsense\r\n\r\n",
    "trailer with a space": b"2\r\n{}\r\n0\r\nX-A : b\r\n\r\n",
    "folded trailer": b"2\r\n{}\r\n0\r\nX-A: b\r\n c\r\n\r\n",
    "LF in trailers": b"2\r\n{}\r\n0\r\nX-A: b\n\n",
    "endless trailer": b"2\r\n{}\r\n0\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n",
    "many trailers": b"2\r\n{}\r\n0\r\n" + b"X-A: b\r\n" * 5000 + b"\r\n",
}

#: Largest body that a compression is tried with, in bytes.
INFLATED_BYTES = 30_000_000


def chunks(rng: Random, seed: Request, host: bytes) -> Case:
    """Send the body in chunks, which is valid."""
    name, form = rng.choice(list(VALID_CHUNKS.items()))
    wire = seed.chunked(host, form % (len(seed.body), seed.body))
    return Case(f"chunks: {name}", (wire,), (seed.method,), Ending.WAIT)


def broken_chunks(rng: Random, seed: Request, host: bytes) -> Case:
    """Break the chunks, and ask for the marker behind them: at once, or a moment later."""
    name, stream = rng.choice(list(BROKEN_CHUNKS.items()))
    wire, marker = seed.chunked(host, stream), MARKER % host
    pieces = (wire + marker,) if rng.random() < 0.5 else (wire, marker)
    return Case(
        f"chunks: {name}", pieces, (seed.method,), Ending.WAIT, closes=True, refused=True, gap_s=0.1
    )


def lying_length(rng: Random, seed: Request, host: bytes) -> Case:
    """Give the body a length that is too small or too large."""
    size = max(0, len(seed.body) + rng.choice([-1, 1, -len(seed.body), 1000, 10**7, 10**12]))
    wire = seed.head(host, b"Content-Length: %d" % size) + seed.body
    # What is left of a body is read as a request, and refused as one.
    return Case("length that lies", (wire,), (seed.method, "GET"))


def too_large(rng: Random, seed: Request, host: bytes) -> Case:
    """Announce a body over the limit, and send some of it and a marker."""
    wire = seed.head(host, b"Content-Length: 99000000") + b"a" * rng.choice([0, 10, 100_000])
    return Case("body over the limit", (wire, MARKER % host), (seed.method,), gap_s=0.05)


def compressed(rng: Random, seed: Request, host: bytes) -> Case:
    """Compress the body: well, cut off, of another kind, or to a thousandth of its size."""
    kind = rng.choice(["whole", "cut", "damaged", "other", "bomb", "twice"])
    body = b'{"inputs":"' + b"a" * INFLATED_BYTES if kind == "bomb" else seed.body
    coding = rng.choice([b"gzip", b"deflate"])
    packed = gzip.compress(body, mtime=0) if coding == b"gzip" else zlib.compress(body)
    if kind == "cut":
        packed = packed[: rng.randrange(len(packed))]
    elif kind == "damaged":
        position = rng.randrange(len(packed))
        packed = packed[:position] + bytes([packed[position] ^ 0x55]) + packed[position + 1 :]
    elif kind == "other":
        coding = rng.choice([b"br", b"zstd", b"identity", b"compress"])
    elif kind == "twice":
        packed, coding = gzip.compress(packed, mtime=0), coding + b", gzip"
    request = replace(seed, body=packed).with_header(b"Content-Encoding", coding)
    return Case(f"compression: {kind}", (request.encoded(host),), (seed.method,), Ending.WAIT)


MUTATIONS: list[Callable[[Random, Request, bytes], Case]] = [
    chunks, broken_chunks, broken_chunks, broken_chunks, lying_length, too_large, compressed,
]  # fmt: skip
