"""What detectors share: pictures scaled to one size, and boxes relative to the client's picture.

any name     bytes [rows]                  ->  images     float32 [rows, 3, height, width]
                                               letterbox  float32 [rows, 4]
boxes        float32 [rows, max_det, 4]: left, top, right, bottom, from 0 to 1
scores       float32 [rows, max_det], descending
labels       string [rows, max_det]
classes      int64 [rows, max_det]
count        int64 [rows]: number of boxes; entries beyond it are 0, "" and class -1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from inferno.protocol.tensors import Array, Tensors
from inferno.runtimes import images

#: Grey level of the border around a picture of another aspect ratio.
_GREY = 114


Side = Annotated[int, Field(ge=1)]
Channels = tuple[float, float, float]


class Parameters(BaseModel):
    """`parameters` of a detector's package."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Input size of the model, in pixels: height and width, or one number for both.
    size: Side | tuple[Side, Side] = 640
    #: Subtracted from red, green and blue, which range from 0 to 1.
    mean: Channels = (0.0, 0.0, 0.0)
    #: Divisor of red, green and blue, after the subtraction.
    std: Channels = (1.0, 1.0, 1.0)
    #: Lowest score of a box.
    conf: float = Field(default=0.35, ge=0, le=1)
    #: Most boxes of one picture.
    max_det: int = Field(default=20, ge=1)
    #: Most pixels of a picture; larger ones are refused.
    max_pixels: int = Field(default=images.MAX_PIXELS, ge=1)
    #: The artifact's name for its input.
    input: str = "images"


class Detector:
    """Fits pictures into the model's input; a subclass finds the boxes in its outputs."""

    bypass = ("letterbox",)

    def __init__(self, parameters: Parameters, labels: tuple[str, ...]) -> None:
        """Store the package's parameters, and its class names if it has any."""
        size = parameters.size
        self._height, self._width = (size, size) if isinstance(size, int) else size
        self._mean = np.array(parameters.mean, np.float32).reshape(3, 1, 1)
        self._std = np.array(parameters.std, np.float32).reshape(3, 1, 1)
        self._parameters = parameters
        self._labels = labels

    def sample(self) -> Tensors:
        """Return a picture to warm up with."""
        return images.sample()

    def preprocess(self, inputs: Tensors) -> Tensors:
        """Decode the pictures of one task, and fit them into the model's input with a grey border.

        Raises:
          ValueError: an input is not a picture, or is too large.
        """
        [given] = inputs.values()
        # One by one: a picture of 50 megapixels takes 150 MB until it is scaled.
        fitted, places = zip(*map(self._fit, given), strict=True)
        return {
            self._parameters.input: np.stack(fitted),
            "letterbox": np.array(places, np.float32),
        }

    def _fit(self, raw: bytes) -> tuple[Array, tuple[int, int, int, int]]:
        """Return the model's input, and left, top, width and height of the picture in it."""
        picture = images.decode(raw, self._parameters.max_pixels)
        scale = min(self._width / picture.width, self._height / picture.height)
        width, height = (max(1, round(n * scale)) for n in picture.size)
        left, top = (self._width - width) // 2, (self._height - height) // 2
        whole = Image.new("RGB", (self._width, self._height), (_GREY,) * 3)
        whole.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (left, top))
        pixels = np.asarray(whole, np.float32).transpose(2, 0, 1) / 255
        return (pixels - self._mean) / self._std, (left, top, width, height)

    def detections(
        self, boxes: Sequence[Array], classes: Sequence[Array], scores: Sequence[Array],
        letterbox: Array,
    ) -> Tensors:  # fmt: skip
        """Return the outputs of a batch.

        Args:
          boxes: for each row, float [n, 4] in pixels of the model's input.
          classes: for each row, int [n].
          scores: for each row, float [n], descending.
          letterbox: float [rows, 4], from `preprocess`.
        """
        rows, most = len(letterbox), self._parameters.max_det
        found = {
            "boxes": np.zeros((rows, most, 4), np.float32),
            "scores": np.zeros((rows, most), np.float32),
            "labels": np.full((rows, most), "", object),
            "classes": np.full((rows, most), -1, np.int64),
            "count": np.zeros(rows, np.int64),
        }
        for row, (left, top, width, height) in enumerate(letterbox):
            n = min(len(scores[row]), most)
            inside = (boxes[row][:n] - (left, top, left, top)) / (width, height, width, height)
            found["boxes"][row, :n] = inside.clip(0, 1)
            found["scores"][row, :n] = scores[row][:n]
            found["labels"][row, :n] = [self._name(int(c)) for c in classes[row][:n]]
            found["classes"][row, :n] = classes[row][:n]
            found["count"][row] = n
        return found

    def _name(self, number: int) -> str:
        return self._labels[number] if number < len(self._labels) else str(number)
