"""Decoding of pictures that clients send."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from inferno.protocol.tensors import Tensors

#: Most pixels of a picture; larger ones are refused before they are decompressed.
MAX_PIXELS = 50_000_000

#: Exceptions of Pillow's decoders on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode(raw: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG, JPEG, GIF or WebP file, and rotate it according to its EXIF data.

    Returns:
      An RGB picture: the first frame of an animation.
    Raises:
      ValueError: the file has another format, is damaged, or is too large.
    """
    try:
        with warnings.catch_warnings():
            # The caller's limit is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(raw), formats=("PNG", "JPEG", "GIF", "WEBP"))
    except _DAMAGED as exc:
        raise ValueError("expected a PNG, JPEG, GIF or WebP image") from exc
    if picture.width * picture.height > max_pixels:
        raise ValueError(
            f"the image has {picture.width}x{picture.height} pixels; expected at most {max_pixels}"
        )
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except _DAMAGED as exc:
        raise ValueError("the image is damaged") from exc


def sample() -> Tensors:
    """Return inputs of one row: `image`, a small grey picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, "PNG")
    return {"image": np.array([buffer.getvalue()], object)}
