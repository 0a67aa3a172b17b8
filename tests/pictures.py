"""Picture files for tests, honest and hostile."""

from __future__ import annotations

import struct
import zlib

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, *more: bytes) -> bytes:
    """Return a PNG that ends where its pixels begin.

    Args:
      width: pixels.
      height: pixels.
      more: chunks between the header and the pixels.
    """
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return PNG_MAGIC + png_chunk(b"IHDR", head) + b"".join(more) + png_chunk(b"IDAT", b"\0" * 8)


def white_png(width: int, height: int) -> bytes:
    """Return a PNG of one colour: a few kilobytes for millions of pixels."""
    rows = zlib.compress((b"\0" + b"\xff" * (4 * width)) * height, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return PNG_MAGIC + chunks
