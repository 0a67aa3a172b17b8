"""Turns texts into word pieces, and scores into labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from inferno.runtimes import ModelContext

Arrays = dict[str, npt.NDArray[Any]]


class Processor:
    """Tokenises one task's texts; names the classes of one batch."""

    def __init__(self, tokenizer: Tokenizer, labels: tuple[str, ...]) -> None:
        """Take a tokenizer that pads and truncates, and the labels in the order of the scores."""
        self._tokenizer = tokenizer
        self._labels = np.array(labels, object)

    def preprocess(self, inputs: Arrays) -> Arrays:
        """Tokenise the rows of one task.

        Args:
          inputs: `text`, object array of str [rows].
        Returns:
          `input_ids` and `attention_mask`, int64 [rows, tokens of the longest row].
        """
        encodings = self._tokenizer.encode_batch_fast(inputs["text"].tolist())
        return {
            "input_ids": np.array([e.ids for e in encodings], np.int64),
            "attention_mask": np.array([e.attention_mask for e in encodings], np.int64),
        }

    def postprocess(self, outputs: Arrays) -> Arrays:
        """Add the more probable label to the scores.

        Args:
          outputs: `scores`, float32 [rows, 2].
        Returns:
          `label`, object array of str [rows], and `scores`.
        """
        scores = outputs["scores"]
        return {"label": self._labels[scores.argmax(axis=1)], "scores": scores}


def build(context: ModelContext) -> Processor:
    """Load the version's tokenizer; `parameters.max_tokens` is where texts are cut off."""
    tokenizer = Tokenizer.from_file(str(context.path / "tokenizer.json"))
    tokenizer.enable_truncation(context.parameters["max_tokens"])
    tokenizer.enable_padding()
    return Processor(tokenizer, context.labels)
