"""Detectors that choose among their boxes themselves, as torchvision's and exports with NMS do.

`processor: inferno.processors.boxes:build`. The artifact gives `boxes` [batch, n, 4] as left, top,
right and bottom in pixels, `labels` [batch, n] and `scores` [batch, n].
"""

from __future__ import annotations

import numpy as np

from inferno.processors.detection import Detector
from inferno.protocol.tensors import Tensors
from inferno.runtimes.base import ModelContext


class Boxes(Detector):
    """Leaves out unlikely boxes."""

    def postprocess(self, outputs: Tensors) -> Tensors:
        """Return the boxes of a batch, see `inferno.processors.detection`."""
        boxes, classes, scores = [], [], []
        for row, found in enumerate(outputs["scores"]):
            likely = np.flatnonzero(found >= self._options.conf)
            likely = likely[np.argsort(-found[likely], kind="stable")]
            boxes.append(outputs["boxes"][row][likely])
            classes.append(outputs["labels"][row][likely])
            scores.append(found[likely])
        return self.detections(boxes, classes, scores, outputs["letterbox"])


def build(context: ModelContext) -> Boxes:
    """Build the processor; `parameters` are those of `inferno.processors.detection`."""
    return Boxes(context)
