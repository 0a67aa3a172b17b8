"""Build ONNX models node by node: faster than exporting from PyTorch, with fewer packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
#: Element type of `onnx.TensorProto`, and shape.
TensorType = tuple[int, list[int | str]]


def floats(*shape: int | str) -> TensorType:
    """Describe a float32 tensor; symbolic dimensions are names."""
    return TensorProto.FLOAT, list(shape)


class Graph:
    """An ONNX graph under construction: methods add nodes and return the name of the result."""

    def __init__(self) -> None:
        """Start an empty graph."""
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: Array) -> str:
        """Add a constant."""
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(
        self, op: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any
    ) -> str:
        """Add one node."""
        name = output or f"{op}_{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(op, inputs, [name], name=name, domain=domain, **attributes)
        )
        return name

    def integers(self, *values: int) -> str:
        """Add a constant list of int64, such as axes or bounds."""
        return self.constant(np.array(values, np.int64))

    def linear(self, x: str, weight: Array, bias: Array) -> str:
        """Add `x @ weight.T + bias`; weight is (out, in), as PyTorch stores it."""
        return self.add("Add", self.add("MatMul", x, self.constant(weight.T)), self.constant(bias))

    def model(
        self, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType]
    ) -> onnx.ModelProto:
        """Finish the model.

        Args:
          inputs: element type and shape of each input, by name.
          outputs: element type and shape of each output, by the name of its node.
        """
        given, made = (
            [
                helper.make_tensor_value_info(name, dtype, shape)
                for name, (dtype, shape) in tensors.items()
            ]
            for tensors in (inputs, outputs)
        )
        graph = helper.make_graph(self._nodes, "graph", given, made, self._constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
