"""Bounds what kombu decompresses: a few bytes in Redis must not become gigabytes in a worker."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from kombu import compression
from kombu.exceptions import DecodeError

#: Maximum size of a decompressed body, in bytes.
MAX_BYTES = 64 << 20
#: Maximum memory of the lzma decoder, in bytes.
_LZMA_BYTES = 128 << 20

_DECODERS: dict[str, Callable[[], Any]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lambda: lzma.LZMADecompressor(memlimit=_LZMA_BYTES),
}


def bound() -> None:
    """Replace kombu's decoders; a method without a bounded one is unknown from then on."""
    for name in list(compression._decoders):
        if name in _DECODERS:
            compression._decoders[name] = _bounded(_DECODERS[name])
        else:
            del compression._decoders[name]


def _bounded(make: Callable[[], Any]) -> Callable[[bytes], bytes]:
    def decompress(body: bytes) -> bytes:
        found: bytes = make().decompress(body, MAX_BYTES + 1)
        if len(found) > MAX_BYTES:
            raise DecodeError(f"expected a body of at most {MAX_BYTES} bytes when decompressed")
        return found

    return decompress
