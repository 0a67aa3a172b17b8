"""Detectors that suppress overlapping boxes themselves, such as torchvision's or exports with NMS.

`processor: inferno.processors.boxes:build`. The artifact returns `boxes` [batch, n, 4] as left,
top, right and bottom in pixels, `labels` [batch, n] and `scores` [batch, n]. Artifacts exported for
a single picture leave out the first dimension.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from inferno.processors.detection import Detector, Parameters
from inferno.protocol.tensors import Tensors
from inferno.runtimes.base import ModelContext, read_parameters

Output = Literal["boxes", "labels", "scores"]


class BoxesParameters(Parameters):
    """`parameters` of the package of such a detector."""

    #: The artifact's names of these outputs, where they differ.
    outputs: dict[Output, str] = Field(default_factory=dict)
    #: Names of the tensors that a module returns; read by the torchscript runtime.
    output_names: tuple[str, ...] = ()


class Boxes(Detector):
    """Drops unlikely boxes."""

    def __init__(self, parameters: BoxesParameters, labels: tuple[str, ...]) -> None:
        """Store the package's parameters, and its class names if it has any."""
        super().__init__(parameters, labels)
        self._names = parameters.outputs

    def postprocess(self, outputs: Tensors) -> Tensors:
        """Return the boxes of a batch, see `inferno.processors.detection`.

        Raises:
          ValueError: the artifact's outputs have other names or shapes.
        """
        letterbox = outputs.pop("letterbox")
        given = {name: self._names.get(name, name) for name in ("boxes", "labels", "scores")}
        missing = [called for called in given.values() if called not in outputs]
        if missing:
            raise ValueError(
                f"the artifact has no output {missing[0]!r}; it has {', '.join(outputs)}; "
                "parameters.outputs says which are boxes, labels and scores"
            )
        all_boxes, all_labels, all_scores = (outputs[called] for called in given.values())
        if all_scores.ndim == 1:
            all_boxes, all_labels, all_scores = all_boxes[None], all_labels[None], all_scores[None]
        shape = all_scores.shape
        if len(shape) != 2 or all_labels.shape != shape or all_boxes.shape != (*shape, 4):
            raise ValueError(
                "expected boxes [batch, n, 4], labels [batch, n] and scores [batch, n], got "
                f"{list(all_boxes.shape)}, {list(all_labels.shape)} and {list(shape)}"
            )
        boxes, classes, scores = [], [], []
        for row, found in enumerate(all_scores):
            likely = np.flatnonzero(found >= self._parameters.conf)
            likely = likely[np.argsort(-found[likely], kind="stable")]
            boxes.append(all_boxes[row][likely])
            classes.append(all_labels[row][likely])
            scores.append(found[likely])
        return self.detections(boxes, classes, scores, letterbox)


def build(context: ModelContext) -> Boxes:
    """Build the processor; `parameters` are those of `BoxesParameters`."""
    return Boxes(read_parameters(BoxesParameters, context), context.labels)
