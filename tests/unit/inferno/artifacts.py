"""Small artifacts that play large ones, with the same inputs and outputs."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from transformers import PreTrainedTokenizerFast

from inferno.protocol.tensors import Array

WORDS = [
    "what",
    "a",
    "lovely",
    "day",
    "it",
    "is",
    "to",
    "be",
    "asked",
    "how",
    "the",
    "models",
    "answer",
]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]

#: Of the configuration of a transformer of two tiny layers, ...
TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
#: ... and of one that reads what `tiny_tokenizer` writes.
TINY_BERT: dict[str, Any] = {
    "vocab_size": len(_SPECIAL + WORDS), "max_position_embeddings": 32, **TINY,
}  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like BERT's that knows a few words and reads at most 32 tokens."""
    numbers = {word: number for number, word in enumerate(_SPECIAL + WORDS)}
    words = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def export_bert(module: torch.nn.Module, file: Path) -> None:
    """Write a BERT with eager attention as ONNX, with the inputs that Optimum's exports have."""
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(2, 5, dtype=torch.int64)
    with warnings.catch_warnings():
        # Of the older exporter, which needs no further library.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (ids, ids, torch.zeros_like(ids)), file, input_names=names,
            output_names=["logits"], dynamo=False,
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names}
            | {"logits": {0: "batch"}},
        )  # fmt: skip


def yolo_bytes(candidates: Array, size: int) -> bytes:
    """Return an ONNX graph of YOLO's layout that finds the same in every picture.

    All scores are times the brightest pixel, so that brighter pictures have likelier boxes.

    Args:
      candidates: centre, width and height in pixels, and the classes' scores, float32 [n, 4 + k].
      size: height and width of its input in pixels.
    """
    known = candidates.T.copy()
    nodes = [
        helper.make_node("ReduceMax", ["images", "axes"], ["brightest"], keepdims=0),
        helper.make_node("Reshape", ["brightest", "column"], ["factor"]),
        helper.make_node("Mul", ["factor", "scores"], ["scaled"]),
        helper.make_node("Mul", ["factor", "zero"], ["none"]),
        helper.make_node("Add", ["none", "places"], ["spread"]),
        helper.make_node("Concat", ["spread", "scaled"], ["output0"], axis=1),
    ]
    constants = {
        "axes": np.array([1, 2, 3]),
        "column": np.array([-1, 1, 1]),
        "zero": np.zeros((1, 4, 1), np.float32),
        "places": known[None, :4],
        "scores": known[None, 4:],
    }
    graph = helper.make_graph(
        nodes,
        "yolo",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", "values", "n"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    raw: bytes = model.SerializeToString()
    return raw


def png(width: int, height: int, red: int = 0) -> bytes:
    """Return a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()
