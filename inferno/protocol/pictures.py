"""Sizes of pictures, read from their headers.

Step *submit*: a picture of a few kilobytes can have millions of pixels, so its size is known before
anything is decoded. Pillow reads headers too, but also inflates the texts and colour profiles that
a file may have before its pixels: up to 64 MB for each picture.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

#: Most parts of a file before its pixels; honest files have less than a hundred.
_MAX_PARTS = 2000
#: Most scans of a JPEG; each one of a progressive file costs time for all of its pixels.
_MAX_SCANS = 100

#: Markers of JPEG: start of a frame (of any kind), start of a scan, and those without a length.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN = 0xDA
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


def size(raw: bytes) -> tuple[int, int] | None:
    """Return the width and height of a picture, in pixels, or None for bytes of another format.

    Args:
      raw: a PNG, JPEG, GIF or WebP file. Of an animation, only the first frame counts.
    Raises:
      ValueError: the header is damaged or misleading.
    """
    for magic, read in _READERS.items():
        if raw.startswith(magic) and (magic != b"RIFF" or raw[8:12] == b"WEBP"):
            try:
                width, height = read(raw)
            except (struct.error, IndexError):
                raise _truncated() from None
            if not width or not height:
                raise ValueError(f"the image has {width}x{height} pixels")
            return width, height
    return None


def _png(raw: bytes) -> tuple[int, int]:
    found = (0, 0)
    at = 8
    for _ in range(_MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", raw, at)
        if kind == b"IDAT":
            return found
        if kind == b"IHDR":
            # Decoders let a second header replace the first.
            found = max(found, struct.unpack_from(">II", raw, at + 8), key=math.prod)
        at += 12 + length
    raise _too_many_parts()


def _jpeg(raw: bytes) -> tuple[int, int]:
    if raw.count(b"\xff\xda") > _MAX_SCANS:
        raise ValueError(f"the image has more than {_MAX_SCANS} scans")
    found = (0, 0)
    at = 2
    for _ in range(_MAX_PARTS):
        if (at := raw.find(b"\xff", at)) < 0:
            raise _truncated()
        while (marker := raw[at]) == 0xFF:
            at += 1
        at += 1
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", raw, at + 3)
            found = max(found, (width, height), key=math.prod)
        if marker == _SCAN:
            return found
        if marker and marker not in _BARE:
            at += struct.unpack_from(">H", raw, at)[0]
    raise _too_many_parts()


def _gif(raw: bytes) -> tuple[int, int]:
    width, height, flags = struct.unpack_from("<HHB", raw, 6)
    at = 13 + _palette(flags)
    for _ in range(_MAX_PARTS):
        kind = raw[at]
        if kind == 0x2C:
            # A frame may be larger than the screen, which then grows.
            left, top, wide, high = struct.unpack_from("<HHHH", raw, at + 1)
            return max(width, left + wide), max(height, top + high)
        if kind != 0x21:
            at += 1
            continue
        at += 2
        at = _after_blocks(raw, at)
    raise _too_many_parts()


def _palette(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(raw: bytes, at: int) -> int:
    for _ in range(_MAX_PARTS):
        length = raw[at]
        at += 1 + length
        if not length:
            return at
    raise _too_many_parts()


def _truncated() -> ValueError:
    return ValueError("the image is truncated")


def _too_many_parts() -> ValueError:
    return ValueError(f"the image has more than {_MAX_PARTS} parts before its pixels")


def _webp(raw: bytes) -> tuple[int, int]:
    kind = raw[12:16]
    if kind == b"VP8X":
        wide, wider, high, higher = struct.unpack_from("<HBHB", raw, 24)
        return 1 + (wider << 16 | wide), 1 + (higher << 16 | high)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", raw, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", raw, 26)
    return width & 0x3FFF, height & 0x3FFF


#: Reader of each format, by the first bytes of its files.
_READERS: dict[bytes, Callable[[bytes], tuple[int, int]]] = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"GIF8": _gif,
    b"RIFF": _webp,
}
