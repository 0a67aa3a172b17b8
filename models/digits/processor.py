"""Turn pictures of digits into the form of the training images, and scores into labels.

scikit-learn's digits are 8x8 pixels from 0 (paper) to 16 (ink); the ink fills the height and is
centred. A client's picture of any size is brought into that form: grey, cut to the ink, scaled.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from inferno.runtimes import ModelContext

Arrays = dict[str, npt.NDArray[Any]]
Grey = npt.NDArray[np.float32]

SIDE = 8
#: Value of a pixel that is all ink.
INK = 16.0
#: Longest side of a picture, in pixels; larger ones are reduced first.
_WORKING_SIDE = 256
#: Smallest accepted contrast between ink and paper, of 255.
_MIN_CONTRAST = 24
_FORMATS = ("PNG", "JPEG")

#: What Pillow's decoders raise on damaged files.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class Processor:
    """Decodes and checks the inputs of one task; names the digits of one batch."""

    def __init__(self, labels: tuple[str, ...], max_pixels: int) -> None:
        """Store the digits' names, in the order of the scores, and the limit of pixels."""
        self._labels = np.array(labels, object)
        self._max_pixels = max_pixels

    def preprocess(self, inputs: Arrays) -> Arrays:
        """Bring the rows of one task into the network's form.

        Args:
          inputs: either `image`, object array of bytes [rows], or `pixels`, float32 [rows, 8, 8].
        Returns:
          `ink`, float32 [rows, 8, 8], from 0 (paper) to 16 (ink).
        Raises:
          ValueError: names the input and the expectation.
        """
        if "image" in inputs:
            return {"ink": np.stack([self._read(raw) for raw in inputs["image"]])}
        pixels = inputs["pixels"]
        # Written so that NaN does not pass.
        if not ((pixels >= 0) & (pixels <= INK)).all():
            raise ValueError(f"pixels: expected values from 0 (paper) to {INK:g} (ink)")
        return {"ink": pixels}

    def postprocess(self, outputs: Arrays) -> Arrays:
        """Add the most probable digit's name to the scores.

        Args:
          outputs: `scores`, float32 [rows, 10].
        Returns:
          `label`, object array of str [rows], and `scores`.
        """
        scores = outputs["scores"]
        return {"label": self._labels[scores.argmax(axis=1)], "scores": scores}

    def _read(self, raw: bytes) -> Grey:
        return _to_digit(_decode(raw, self._max_pixels))


def _decode(raw: bytes, max_pixels: int) -> Grey:
    """Decode a picture to grey values from 0 (black) to 255 (white), at most 256 on a side.

    Raises:
      ValueError: the picture is damaged, too large, or neither PNG nor JPEG.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit is checked before anything is decompressed.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw), formats=_FORMATS)
        if image.width * image.height > max_pixels:
            raise _TooLarge(
                f"image: expected at most {max_pixels} pixels, got {image.width} x {image.height}"
            )
        # Lets the JPEG decoder skip detail that is discarded just below.
        image.draft("L", (_WORKING_SIDE, _WORKING_SIDE))
        return _grey(ImageOps.exif_transpose(image))
    except _TooLarge:
        raise
    except UnidentifiedImageError:
        raise ValueError(
            "image: expected a PNG or JPEG picture of one digit, got other bytes"
        ) from None
    except _DECODING_ERRORS as exc:
        raise ValueError(
            f"image: expected a readable PNG or JPEG picture of one digit: {exc}"
        ) from None


class _TooLarge(ValueError):
    """The picture has too many pixels; Pillow also raises ValueError."""


def _grey(image: Image.Image) -> Grey:
    if image.mode.startswith(("I", "F")):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        values = np.asarray(image, np.float32)
        image = Image.fromarray((values * (255 / max(values.max(), 255))).astype(np.uint8))
    if image.has_transparency_data:
        # A drawing on a transparent canvas may be black or white: give it the opposite as paper.
        image = image.convert("RGBA")
        grey, opaque = np.asarray(image.convert("L")), np.asarray(image.getchannel("A")) > 127
        dark_ink = not opaque.any() or grey[opaque].mean() < 128
        image = Image.alpha_composite(
            Image.new("RGBA", image.size, "white" if dark_ink else "black"), image
        )
    image = image.convert("L")
    image.thumbnail((_WORKING_SIDE, _WORKING_SIDE), Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def _to_digit(grey: Grey) -> Grey:
    """Bring grey values [height, width] into the form of the training images, [8, 8] from 0 to 16.

    The paper is what most of the border shows, the ink what differs from it most, whichever is
    the lighter.

    Raises:
      ValueError: the picture has no ink.
    """
    border = np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])
    distance = np.abs(grey - np.median(border))
    contrast = distance.max()
    if contrast < _MIN_CONTRAST:
        raise ValueError("image: expected a picture of one digit, got one without contrast")
    ink = distance / contrast
    rows, columns = (np.flatnonzero((ink > 0.5).any(axis=axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = cut.shape
    side = max(height, width)
    square = np.zeros((side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = cut
    small = Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) * INK


def build(context: ModelContext) -> Processor:
    """Build the processor; `parameters.max_pixels` limits the pictures that are decoded."""
    return Processor(context.labels, context.parameters["max_pixels"])
