"""YOLO in Ultralytics' export format since v8: one output, float [batch, 4 + classes, candidates].

`processor: inferno.processors.yolo:build`. A candidate consists of the centre, width and height of
a box in pixels, and a score for each class.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from inferno.processors.detection import Detector, Parameters
from inferno.protocol.tensors import Array, Tensors
from inferno.runtimes.base import ModelContext, read_parameters

#: Most candidates of one picture that are compared with each other.
_CANDIDATES = 1000


class YoloParameters(Parameters):
    """`parameters` of the package of a YOLO."""

    #: Boxes of one class whose intersection over union is larger count as the same object.
    iou: float = Field(default=0.45, ge=0, le=1)


class Yolo(Detector):
    """Chooses among the candidates of each picture."""

    def __init__(self, parameters: YoloParameters, labels: tuple[str, ...]) -> None:
        """Store the package's parameters, and its class names if it has any."""
        super().__init__(parameters, labels)
        self._iou = parameters.iou

    def postprocess(self, outputs: Tensors) -> Tensors:
        """Return the boxes of a batch, see `inferno.processors.detection`.

        Raises:
          ValueError: the artifact has another layout, or its classes do not match `labels`.
        """
        letterbox = outputs.pop("letterbox")
        shapes = [list(array.shape) for array in outputs.values()]
        if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][1] < 5:
            raise ValueError(f"expected one output [batch, 4 + classes, candidates], got {shapes}")
        [candidates] = outputs.values()
        # Half precision is too coarse for coordinates in pixels.
        candidates = candidates.astype(np.float32, copy=False)
        classes_given = candidates.shape[1] - 4
        if self._labels and classes_given != len(self._labels):
            raise ValueError(
                f"labels: {len(self._labels)} names; the artifact has {classes_given} classes"
            )
        chosen = [self._choose(row) for row in candidates]
        boxes, classes, scores = zip(*chosen, strict=True)
        return self.detections(boxes, classes, scores, letterbox)

    def _choose(self, candidates: Array) -> tuple[Array, Array, Array]:
        classes = candidates[4:].argmax(0)
        scores = candidates[4:].max(0)
        likely = np.flatnonzero(scores >= self._parameters.conf)
        # Stable, so that equal scores have the same order in every batch.
        likely = likely[np.argsort(-scores[likely], kind="stable")][:_CANDIDATES]
        centre, extent = candidates[:2, likely].T, candidates[2:4, likely].T
        boxes = np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)
        kept = suppress(boxes, classes[likely], self._iou, self._parameters.max_det)
        return boxes[kept], classes[likely][kept], scores[likely][kept]


def suppress(boxes: Array, classes: Array, iou: float, most: int) -> Array:
    """Keep the best of overlapping boxes (non-maximum suppression), for each class separately.

    Args:
      boxes: float [n, 4] as left, top, right, bottom, the best first.
      classes: int [n].
      iou: intersection over union above which two boxes count as the same object.
      most: most boxes to keep.
    Returns:
      Indices of the kept boxes, int [kept].
    """
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    left = np.arange(len(boxes))
    kept: list[int] = []
    while left.size and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(best)
        corner = np.maximum(boxes[best, :2], boxes[left, :2])
        opposite = np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.prod(np.maximum(opposite - corner, 0), axis=1)
        union = areas[best] + areas[left] - shared
        left = left[(shared <= iou * union) | (classes[left] != classes[best])]
    return np.array(kept, np.intp)


def build(context: ModelContext) -> Yolo:
    """Build the processor; `parameters` are those of `YoloParameters`."""
    return Yolo(read_parameters(YoloParameters, context), context.labels)
