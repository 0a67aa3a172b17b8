"""Pictures that are small as files and large in memory."""

from __future__ import annotations

import struct
import zlib


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """Return a PNG of 32-bit pixels with a dark square."""
    third = width * 4 // 3
    light = b"\xff" * (width * 4)
    dark = light[:third] + (b"\0\0\0\xff" * third)[:third] + light[2 * third :]
    compressor, rows = zlib.compressobj(9), b""
    for row in range(height):
        is_dark = height // 3 < row < 2 * height // 3
        rows += compressor.compress(b"\0" + (dark if is_dark else light))
    rows += compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", rows)
        + _chunk(b"IEND", b"")
    )
