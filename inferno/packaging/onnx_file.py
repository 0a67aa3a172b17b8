"""Reads an ONNX file: its inputs, outputs and weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TypeProto, ValueInfoProto, helper

from inferno.errors import PackageError
from inferno.packaging.draft import Dimension, Draft, Tensor, named
from inferno.protocol import tensors


def draft(path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Draft:
    """Read an ONNX file; see `inferno.packaging.reading.read`.

    Raises:
      PackageError: the file is not an ONNX model, or has inputs that clients cannot send.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as exc:
        raise PackageError(f"{path}: not an ONNX file: {exc}") from None
    graph = model.graph
    if not graph.output:
        raise PackageError(f"{path}: not an ONNX file, or one without outputs")
    # In old files, weights are also listed as inputs.
    weights = {tensor.name for tensor in graph.initializer}
    found = [_tensor(path, value) for value in graph.input if value.name not in weights]
    if not found:
        raise PackageError(f"{path}: has no inputs")
    notes = []
    made = []
    for value in graph.output:
        if value.type.WhichOneof("value") == "tensor_type":
            made.append(_tensor(path, value))
        else:
            notes.append(
                f"The output {value.name} is left out, because it is not a tensor. Export "
                "scikit-learn classifiers with the option zipmap=False."
            )
    if not made:
        raise PackageError(f"{path}: has no output that is a tensor")
    return Draft(
        source=path.name,
        format="onnx",
        files={"model.onnx": path} | _external_files(path, model),
        artifact="model.onnx",
        inputs=named(path, found, inputs, "input"),
        outputs=named(path, made, outputs, "output"),
        description=next(iter((model.doc_string or graph.doc_string).splitlines()), ""),
        notes=notes,
        fixed_rows=_fixed_rows(found),
    )


def _tensor(path: Path, value: ValueInfoProto) -> Tensor:
    if value.type.WhichOneof("value") != "tensor_type":
        raise PackageError(f"{path}: the input {value.name} is not a tensor, so it cannot be sent")
    kind = value.type.tensor_type
    if kind.elem_type == onnx.TensorProto.STRING:
        name: str | None = "string"
    else:
        name = tensors.dtype_name(str(helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    if name is None:
        element = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise PackageError(
            f"{path}: {value.name} has dtype {element}, which cannot be sent; expected one of "
            f"{', '.join(tensors.DTYPES)}. Add a Cast to the graph"
        )
    return Tensor(value.name, name, _shape(kind))


def _shape(kind: TypeProto.Tensor) -> tuple[Dimension, ...] | None:
    if not kind.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or None
        for dim in kind.shape.dim
    )


def _fixed_rows(found: Sequence[Tensor]) -> int | None:
    """Return the first dimension if it is the same number in all inputs, else None."""
    rows = {tensor.shape[0] if tensor.shape else None for tensor in found}
    (only, *others) = rows
    return only if isinstance(only, int) and not others else None


def _external_files(path: Path, model: onnx.ModelProto) -> dict[str, Path]:
    """Return the external files that hold weights, by their names in the ONNX file."""
    files: dict[str, Path] = {}
    for tensor in _weights(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        name = next(entry.value for entry in tensor.external_data if entry.key == "location")
        file = (path.parent / name).resolve()
        if Path(name).is_absolute() or not file.is_relative_to(path.parent.resolve()):
            raise PackageError(f"{path}: weights are in {name}; expected a file in the same folder")
        if not file.is_file():
            raise PackageError(f"{path}: weights are in {name}, which does not exist")
        files[name] = file
    return files


def _weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _weights(inner)
