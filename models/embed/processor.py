"""Turns texts into word pieces for the MiniLM sentence encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from inferno.runtimes import ModelContext

Arrays = dict[str, npt.NDArray[Any]]


class Processor:
    """Tokenises; pooling and normalisation are part of the graph."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer that pads and truncates."""
        self._tokenizer = tokenizer

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


def build(context: ModelContext) -> Processor:
    """Load the version's tokenizer; `parameters.max_tokens` is where texts are cut off."""
    tokenizer = Tokenizer.from_file(str(context.path / "tokenizer.json"))
    tokenizer.enable_truncation(context.parameters["max_tokens"])
    tokenizer.enable_padding()
    return Processor(tokenizer)
