"""Small ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper, save

Shape = Sequence[int | str | None] | None


def value(name: str, dtype: int, shape: Shape) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: Sequence[Sequence[Any]],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    **weights: np.ndarray,
) -> ModelProto:
    """Make a model; a node is an operation, its inputs, its output and perhaps its attributes."""
    made = [
        helper.make_node(operation, taken, [given], **(attributes[0] if attributes else {}))
        for operation, taken, given, *attributes in nodes
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(made, "graph", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def linear(path: Path, rows: int | str | None = "n", out: Shape = ("n", 3)) -> Path:
    """Write a layer from 4 numbers to 3."""
    weights = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
    x = value("x", TensorProto.FLOAT, [rows, 4])
    y = value("y", TensorProto.FLOAT, out)
    save(model([("MatMul", ["x", "w"], "y")], [x], [y], w=weights), path)
    return path
