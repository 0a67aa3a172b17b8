"""Make the artifacts of `digits` from its weights, unless they are up to date.

`python models/digits/prepare.py`; needs numpy, onnx, onnxruntime, safetensors and torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import preparation
from preparation import PreparationError, step

if TYPE_CHECKING:
    from network import Network
    from torch import Tensor

HERE = Path(__file__).resolve().parent
ONNX, TORCHSCRIPT = HERE / "1", HERE / "2"
WEIGHTS = HERE / "weights.safetensors"
TOOLS = ("numpy", "onnx", "onnxruntime", "safetensors", "torch")

#: Largest accepted difference of a score from the network's own.
MAX_DIFFERENCE = 1e-5


def main() -> None:
    """Make artifacts that are missing or out of date."""
    scripts = [HERE / "prepare.py", HERE / "network.py", HERE.parent / "onnx_graph.py"]
    key = preparation.fingerprint([WEIGHTS, *scripts])
    if preparation.is_prepared(ONNX, key) and preparation.is_prepared(TORCHSCRIPT, key):
        step("digits: up to date")
        return
    make(key)


def make(key: str) -> None:
    """Write the network in both formats, each compared with the original."""
    from network import Network
    from safetensors.torch import load_file

    network = Network()
    network.load_state_dict(load_file(WEIGHTS))
    network.eval()
    with preparation.replacing(ONNX / "model.onnx") as path:
        step("digits 1/2: writing and comparing ONNX")
        write_onnx(network, path)
    preparation.mark_prepared(ONNX, key, ["model.onnx"], TOOLS)
    with preparation.replacing(TORCHSCRIPT / "model.pt") as path:
        step("digits 2/2: writing and comparing TorchScript")
        write_torchscript(network, path)
    preparation.mark_prepared(TORCHSCRIPT, key, ["model.pt"], TOOLS)


def write_onnx(network: Network, path: Path) -> None:
    """Write the network as ONNX.

    Raises:
      PreparationError: the file computes other scores.
    """
    import onnx
    import onnxruntime
    import torch
    from network import INK
    from onnx_graph import Graph, floats

    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    graph = Graph()
    x = graph.add("Unsqueeze", "ink", graph.integers(1))
    x = graph.add("Mul", x, graph.constant(torch.tensor(1 / INK).numpy()))
    for layer in ("conv1", "conv2"):
        kernel, bias = (graph.constant(weights[f"{layer}.{kind}"]) for kind in ("weight", "bias"))
        x = graph.add("Relu", graph.add("Conv", x, kernel, bias, pads=[1, 1, 1, 1]))
    x = graph.add("Flatten", graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    x = graph.add("Relu", graph.linear(x, weights["dense1.weight"], weights["dense1.bias"]))
    x = graph.linear(x, weights["dense2.weight"], weights["dense2.bias"])
    graph.add("Softmax", x, output="scores", axis=1)

    model = graph.model({"ink": floats("batch", 8, 8)}, {"scores": floats("batch", 10)})
    onnx.save(model, path)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    samples = _samples()
    _compare(
        "ONNX", network, torch.from_numpy(session.run(None, {"ink": samples.numpy()})[0]), samples
    )


def write_torchscript(network: Network, path: Path) -> None:
    """Write the network as TorchScript.

    Raises:
      PreparationError: the file computes other scores.
    """
    import torch

    with torch.no_grad():
        torch.jit.script(network).save(str(path))  # type: ignore[no-untyped-call]
        samples = _samples()
        loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
        _compare("TorchScript", network, loaded(samples), samples)


def _samples() -> Tensor:
    import torch
    from network import INK

    return torch.rand((64, 8, 8), generator=torch.Generator().manual_seed(0)) * INK


def _compare(name: str, network: Network, scores: Tensor, samples: Tensor) -> None:
    import torch

    with torch.no_grad():
        difference = float((scores - network(samples)).abs().max())
    step(f"  largest difference {difference:.1e} (allowed {MAX_DIFFERENCE:.0e})")
    if not difference <= MAX_DIFFERENCE:
        raise PreparationError(
            f"the scores of {name} differ by {difference:.1e} from the network's"
        )


if __name__ == "__main__":
    try:
        main()
    except PreparationError as error:
        sys.exit(f"digits: {error}")
