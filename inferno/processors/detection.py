"""What detectors share: pictures of one size, and boxes as parts of the client's picture.

image        bytes [rows]                  ->  images     float32 [rows, 3, size, size], 0 to 1
                                               letterbox  float32 [rows, 4]
boxes        float32 [rows, max_det, 4]: left, top, right, bottom, from 0 to 1
scores       float32 [rows, max_det], descending
labels       string [rows, max_det]
count        int64 [rows]: how many of these there are; the others are 0 and ""
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from inferno import images
from inferno.protocol.tensors import Array, Tensors
from inferno.runtimes.base import ModelContext

#: The grey beside a picture that is not square.
_GREY = 114


@dataclass(frozen=True)
class Parameters:
    """`parameters` of a detector's package."""

    #: Side of the square picture that the model takes, in pixels.
    size: int = 640
    #: Least score of a box.
    conf: float = 0.35
    #: Boxes of one class that overlap more are the same one: intersection over union.
    iou: float = 0.45
    #: Boxes of one picture, at most.
    max_det: int = 20
    #: Larger pictures are refused.
    max_pixels: int = images.MAX_PIXELS
    #: The artifact's name for its input.
    input: str = "images"


class Detector:
    """Fits pictures into the model's square; a subclass finds the boxes in what it gives."""

    bypass = ("letterbox",)

    def __init__(self, context: ModelContext) -> None:
        """Read the parameters.

        Raises:
          TypeError: there is an unknown one.
        """
        self._options = Parameters(**context.parameters)
        self._labels = context.labels

    def sample(self) -> Tensors:
        """Return a picture to warm up with."""
        return images.sample()

    def preprocess(self, inputs: Tensors) -> Tensors:
        """Decode the pictures of one task and fit them into the square, on grey.

        Raises:
          ValueError: one is no picture, or too large.
        """
        pictures = [images.decode(raw, self._options.max_pixels) for raw in inputs["image"]]
        squares, places = zip(*(self._fit(picture) for picture in pictures), strict=True)
        return {
            self._options.input: np.stack(squares),
            "letterbox": np.array(places, np.float32),
        }

    def _fit(self, picture: Image.Image) -> tuple[Array, tuple[int, int, int, int]]:
        """Return the square, and left, top, width and height of the picture in it."""
        size = self._options.size
        scale = size / max(picture.size)
        width, height = (max(1, round(n * scale)) for n in picture.size)
        left, top = (size - width) // 2, (size - height) // 2
        square = Image.new("RGB", (size, size), (_GREY,) * 3)
        square.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (left, top))
        pixels = np.asarray(square, np.float32).transpose(2, 0, 1) / 255
        return pixels, (left, top, width, height)

    def detections(
        self, boxes: Sequence[Array], classes: Sequence[Array], scores: Sequence[Array],
        letterbox: Array,
    ) -> Tensors:  # fmt: skip
        """Return the outputs of a batch.

        Args:
          boxes: of each row, float [n, 4] in pixels of the square.
          classes: of each row, int [n].
          scores: of each row, float [n], descending.
          letterbox: float [rows, 4], of `preprocess`.
        """
        rows, most = len(letterbox), self._options.max_det
        found = {
            "boxes": np.zeros((rows, most, 4), np.float32),
            "scores": np.zeros((rows, most), np.float32),
            "labels": np.full((rows, most), "", object),
            "count": np.zeros(rows, np.int64),
        }
        for row, (left, top, width, height) in enumerate(letterbox):
            n = min(len(scores[row]), most)
            inside = (boxes[row][:n] - (left, top, left, top)) / (width, height, width, height)
            found["boxes"][row, :n] = inside.clip(0, 1)
            found["scores"][row, :n] = scores[row][:n]
            found["labels"][row, :n] = [self._name(int(c)) for c in classes[row][:n]]
            found["count"][row] = n
        return found

    def _name(self, number: int) -> str:
        return self._labels[number] if number < len(self._labels) else str(number)
