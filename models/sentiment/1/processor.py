"""Turn texts into word pieces, and scores into labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from inferno.processors.text import TextProcessor

if TYPE_CHECKING:
    from inferno.runtimes import ModelContext

Arrays = dict[str, npt.NDArray[Any]]


class Processor(TextProcessor):
    """Tokenises the texts of one task; names the classes of one batch."""

    def __init__(self, context: ModelContext) -> None:
        """Load the version's tokenizer, and its labels in the order of the scores."""
        super().__init__(context)
        self._labels = np.array(context.labels, object)

    def postprocess(self, outputs: Arrays) -> Arrays:
        """Add the more probable label to the scores.

        Args:
          outputs: `scores`, float32 [rows, 2].
        Returns:
          `label`, object array of str [rows], and `scores`.
        """
        scores = outputs["scores"]
        return {"label": self._labels[scores.argmax(axis=1)], "scores": scores}
