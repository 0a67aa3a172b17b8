"""The text processor, with a tokenizer of a few words made here."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from inferno.engine.engine import Engine
from inferno.errors import PackageError
from inferno.processors import text
from inferno.repository.package import Package
from inferno.settings import BatchingSettings, InferenceSettings
from tests.unit.inferno.onnx_files import model, value

ReadPackage = Callable[..., Package]

WORDS = ["[UNK]", "[CLS]", "[SEP]", "it", "is", "warm", "##er", "here", "[PAD]"]
PAD = WORDS.index("[PAD]")


def tokenizer_json(*words: str) -> bytes:
    """Return a tokenizer file that asks for four tokens per text, padded by the last word."""
    vocabulary = {word: n for n, word in enumerate([*WORDS, *words])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=PAD, pad_token="[PAD]", length=4)
    return tokenizer.to_str().encode()


def onnx_bytes() -> bytes:
    """Adds up the ids of each text, and its type ids."""
    pieces = [
        value(name, TensorProto.INT64, ["n", "t"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    nodes = [
        ("Mul", ["input_ids", "attention_mask"], "masked"),
        ("Add", ["masked", "token_type_ids"], "added"),
        ("ReduceSum", ["added", "axes"], "sum", {"keepdims": 0}),
    ]
    out = value("sum", TensorProto.INT64, ["n"])
    return model(nodes, pieces, [out], axes=np.array([1])).SerializeToString()


def fields(**parameters: Any) -> dict[str, Any]:
    return {
        "format": "onnx",
        "entrypoint": None,
        "processor": "inferno.processors.text:build",
        "signature": {
            "inputs": [{"name": "sentence", "dtype": "string", "shape": ["batch"]}],
            "outputs": [{"name": "sum", "dtype": "int64", "shape": ["batch"]}],
        },
        "batching": {"pad": {"input_ids": PAD, "attention_mask": 0, "token_type_ids": 0}},
        "parameters": {"pieces": ["input_ids", "attention_mask", "token_type_ids"]} | parameters,
        "files": {"model.onnx": onnx_bytes(), "tokenizer.json": tokenizer_json()},
    }


def load(package: Package) -> Engine:
    return Engine(package, BatchingSettings(), InferenceSettings(device="cpu", threads=1))


def sentences(*rows: str) -> dict[str, np.ndarray]:
    return {"sentence": np.array(rows, object)}


def test_texts_are_taken_apart_padded_and_answered(package: ReadPackage) -> None:
    engine = load(package(**fields(max_tokens=16)))

    first = engine.prepare(sentences("It is WARMER here", "it"))
    second = engine.prepare(sentences("here"))

    assert first["input_ids"].tolist() == [[1, 3, 4, 5, 6, 7, 2], [1, 3, 2] + [PAD] * 4]
    assert first["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert first["token_type_ids"].tolist() == [[0] * 7] * 2
    answers = engine.forward([first, second])
    assert [answer["sum"].tolist() for answer in answers] == [[28, 6], [10]]


@pytest.mark.parametrize("sentence", ["", "it", "It is WARMER here", "it is it is it is it is"])
def test_a_text_by_itself_is_taken_apart_as_among_others(
    package: ReadPackage, sentence: str
) -> None:
    engine = load(package(**fields(max_tokens=5)))

    alone = engine.prepare(sentences(sentence))
    among = engine.prepare(sentences(sentence, "it"))

    length = alone["attention_mask"].sum()
    assert alone["input_ids"].shape == (1, length)
    assert length <= 5
    for piece, [row] in alone.items():
        assert row.tolist() == among[piece][0, :length].tolist()


def test_without_max_tokens_the_file_says_where_texts_end(package: ReadPackage) -> None:
    prepared = load(package(**fields())).prepare(sentences("it is warmer here"))

    assert prepared["input_ids"].tolist() == [[1, 3, 4, 2]]


def test_an_artifact_is_given_only_the_pieces_that_it_takes(package: ReadPackage) -> None:
    engine = load(package(**fields(pieces=["attention_mask"])))

    assert engine.prepare(sentences("it is")).keys() == {"attention_mask"}


def test_versions_with_equal_files_share_what_was_read_until_none_is_left(
    package: ReadPackage,
) -> None:
    one = text.read(package(**fields()).path / "tokenizer.json", 7)
    again = text.read(package(version=2, **fields()).path / "tokenizer.json", 7)
    shorter = text.read(package(version=3, **fields()).path / "tokenizer.json", 6)
    other = fields() | {"files": {"tokenizer.json": tokenizer_json("more")}}
    different = text.read(package(version=4, **other).path / "tokenizer.json", 7)

    assert again is one
    assert len({id(one), id(shorter), id(different)}) == 3
    held = len(text._read)
    del one, again, shorter, different
    gc.collect()
    assert len(text._read) == held - 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": {"model.onnx": onnx_bytes()}}, "tokenizer.json is missing"),
        (
            {"files": {"model.onnx": onnx_bytes(), "tokenizer.json": "{}"}},
            "tokenizer.json: cannot be read as a tokenizer",
        ),
        ({"parameters": {"max_tokens": 0}}, "parameters.max_tokens"),
        ({"parameters": {"pieces": ["words"]}}, "parameters.pieces"),
    ],
)
def test_a_package_that_cannot_be_used_says_why(
    package: ReadPackage, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(PackageError, match=says):
        load(package(**fields() | changes))
