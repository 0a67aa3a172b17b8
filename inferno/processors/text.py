"""Texts as word pieces, by the `tokenizer.json` beside the artifact of a language model.

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

Piece = Literal["input_ids", "attention_mask", "token_type_ids"]
#: What the library calls them.
_ATTRIBUTES: dict[Piece, str] = {
    "input_ids": "ids",
    "attention_mask": "attention_mask",
    "token_type_ids": "type_ids",
}


class TextParameters(BaseModel):
    """`parameters` of such a package."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Word pieces of a text that are read; the rest is cut off. None: as the file says.
    max_tokens: int | None = Field(default=None, ge=1)
    #: What the artifact takes.
    pieces: tuple[Piece, ...] = ("input_ids", "attention_mask")


class WordPieces:
    """What one file says of how texts are taken apart."""

    def __init__(self, file: Path, max_tokens: int | None) -> None:
        """Read a `tokenizer.json`.

        Args:
          file: as Hugging Face's tokenizers write it.
          max_tokens: as in `TextParameters`.
        Raises:
          PackageError: it is no such file.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as exc:  # The library has no exception of its own.
            raise PackageError(f"{file}: is no tokenizer that can be read: {exc}") from exc
        if max_tokens is not None:
            self._tokenizer.enable_truncation(max_tokens)
        # To the longest text of a task and no further, whatever length the file asks for.
        padding = self._tokenizer.padding or {}
        kept = ("direction", "pad_id", "pad_type_id", "pad_token")
        self._tokenizer.enable_padding(**{name: padding[name] for name in kept if name in padding})

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Take texts apart, padded to the longest one."""
        if len(texts) == 1:
            # This does not give Python's lock away. Most tasks have one text, and for each one of a
            # batch the pass would wait until another thread gives the lock back.
            return [self._tokenizer.encode(texts[0])]
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(texts)
        return encodings


#: By the digest of the file and the length that texts are cut to, as long as a version uses it.
_read: WeakValueDictionary[tuple[str, int | None], WordPieces] = WeakValueDictionary()


def read(file: Path, max_tokens: int | None) -> WordPieces:
    """Read a `tokenizer.json`, or return what a version with an equal one has read.

    Reading one of 30,000 word pieces holds Python's lock for 30 ms, in which no other thread of the
    process gets on, and takes 6 to 10 MB; the versions of a model mostly have the same one.

    Raises:
      PackageError: it is missing, or no such file.
    """
    if not file.is_file():
        raise PackageError(f"{file} is missing; the processor takes texts apart by it")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    found = _read.get((digest, max_tokens))
    if found is None:
        found = _read[digest, max_tokens] = WordPieces(file, max_tokens)
    return found


class TextProcessor:
    """Takes one task's texts apart; a subclass may add `postprocess`."""

    def __init__(self, context: ModelContext) -> None:
        """Read the version's `tokenizer.json`.

        Raises:
          PackageError: it is missing or none, or `parameters` are not those of `TextParameters`.
        """
        parameters = read_parameters(TextParameters, context)
        self._pieces = parameters.pieces
        self._words = read(context.path / "tokenizer.json", parameters.max_tokens)

    def preprocess(self, inputs: Tensors) -> Tensors:
        """Take the rows of one task apart.

        Args:
          inputs: one, object array of str [rows].
        Returns:
          What `pieces` names, int64 [rows, tokens of the longest row].
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
