"""Tokenises texts with the `tokenizer.json` beside the artifact of a language model.

`processor: inferno.processors.text:build`. The package has one input, of strings.

any name     string [rows]  ->  input_ids, attention_mask, token_type_ids: int64 [rows, tokens]
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Encoding, Tokenizer

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.runtimes.base import ModelContext, read_parameters
from inferno.runtimes.texts import head

Piece = Literal["input_ids", "attention_mask", "token_type_ids"]
#: Attributes of the library's `Encoding`.
_ATTRIBUTES: dict[Piece, str] = {
    "input_ids": "ids",
    "attention_mask": "attention_mask",
    "token_type_ids": "type_ids",
}


class TextParameters(BaseModel):
    """`parameters` of a package with this processor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Tokens after which a text is cut off; None for the limit in the file.
    max_tokens: int | None = Field(default=None, ge=1)
    #: Inputs of the artifact.
    pieces: tuple[Piece, ...] = ("input_ids", "attention_mask")


class WordPieces:
    """A tokenizer, as one file describes it."""

    def __init__(self, file: Path, max_tokens: int | None) -> None:
        """Read a `tokenizer.json`.

        Args:
          file: a file of Hugging Face's tokenizers.
          max_tokens: as in `TextParameters`.
        Raises:
          PackageError: it cannot be read as such a file.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as exc:  # The library has no exception of its own.
            raise PackageError(f"{file}: cannot be read as a tokenizer: {exc}") from exc
        if max_tokens is not None:
            self._tokenizer.enable_truncation(max_tokens)
        #: Number of tokens that the model reads; None without a limit.
        self._max_tokens: int | None = (self._tokenizer.truncation or {}).get("max_length")
        # Pad to the longest text of a task only; the file may ask for a fixed length.
        padding = self._tokenizer.padding or {}
        kept = ("direction", "pad_id", "pad_type_id", "pad_token")
        self._tokenizer.enable_padding(**{name: padding[name] for name in kept if name in padding})

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Tokenise texts, padded to the longest one."""
        if self._max_tokens is not None:
            texts = [head(text, self._tokenizer, self._max_tokens) for text in texts]
        if len(texts) == 1:
            # Unlike `encode_batch_fast`, this keeps Python's lock. Most tasks have one text, and
            # the pass would have to get the lock back from other threads for each task of a batch.
            return [self._tokenizer.encode(texts[0])]
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(texts)
        return encodings


#: Tokenizers in use, by the digest of the file and `max_tokens`.
_read: WeakValueDictionary[tuple[str, int | None], WordPieces] = WeakValueDictionary()


def read(file: Path, max_tokens: int | None) -> WordPieces:
    """Read a `tokenizer.json`, or return the tokenizer of a version with an equal file.

    Reading a file of 30,000 tokens takes 6 to 10 MB, and holds Python's lock for 30 ms, so that no
    other thread runs. The versions of a model mostly have the same file.

    Raises:
      PackageError: the file is missing, or cannot be read as a tokenizer.
    """
    if not file.is_file():
        raise PackageError(f"{file} is missing; the processor tokenises texts with it")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    found = _read.get((digest, max_tokens))
    if found is None:
        found = _read[digest, max_tokens] = WordPieces(file, max_tokens)
    return found


class TextProcessor:
    """Tokenises the texts of one task; a subclass may add `postprocess`."""

    def __init__(self, context: ModelContext) -> None:
        """Read the version's `tokenizer.json`.

        Raises:
          PackageError: the file is missing or invalid, or `parameters` do not match
            `TextParameters`.
        """
        parameters = read_parameters(TextParameters, context)
        self._pieces = parameters.pieces
        self._words = read(context.path / "tokenizer.json", parameters.max_tokens)

    def preprocess(self, inputs: Tensors) -> Tensors:
        """Tokenise the rows of one task.

        Args:
          inputs: one object array of str [rows].
        Returns:
          The arrays that `pieces` names, int64 [rows, tokens of the longest row].
        """
        [texts] = inputs.values()
        encodings = self._words.encode(texts.tolist())
        return {
            piece: np.array([getattr(e, _ATTRIBUTES[piece]) for e in encodings], np.int64)
            for piece in self._pieces
        }


def build(context: ModelContext) -> TextProcessor:
    """Build the processor; `parameters` are those of `TextParameters`."""
    return TextProcessor(context)
