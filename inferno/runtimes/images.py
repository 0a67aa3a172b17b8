"""Pictures as clients send them."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from inferno.protocol.tensors import Tensors

#: Pictures of more pixels are refused before they are decompressed.
MAX_PIXELS = 50_000_000

#: What Pillow's decoders raise on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode(raw: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG, JPEG, GIF or WebP file, turned as its EXIF data says.

    Returns:
      An RGB picture; of an animation, the first one.
    Raises:
      ValueError: it is none, damaged, or too large.
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
