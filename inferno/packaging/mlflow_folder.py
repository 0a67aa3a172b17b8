"""Reads an MLflow model's folder: its file MLmodel, and the artifact that MLmodel names.

Uses the first of these flavors that the model has: onnx, pytorch (if saved as TorchScript), both
served without MLflow, and python_function, which is called as MLflow calls it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from inferno.errors import PackageError
from inferno.packaging import pyfunc_model
from inferno.packaging.draft import Dimension, Draft, Tensor
from inferno.protocol import tensors

#: Dtypes by MLflow's types of columns.
_COLUMNS = {
    "boolean": "bool", "integer": "int32", "long": "int64", "float": "float32",
    "double": "float64", "string": "string", "binary": "bytes",
}  # fmt: skip


def draft(path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Draft:
    """Read an MLflow model's folder; see `inferno.packaging.reading.read`.

    Raises:
      PackageError: the folder is not an MLflow model, or no flavor can be served.
    """
    described = _described(path)
    flavors = described["flavors"]
    if "onnx" in flavors:
        found = _onnx(path, flavors["onnx"], inputs, outputs)
    elif "pytorch" in flavors:
        found = _pytorch(path, flavors["pytorch"], described, inputs, outputs)
    elif "python_function" in flavors:
        found = _python_function(path, flavors["python_function"], described, inputs, outputs)
    else:
        raise PackageError(
            f"{path}: has the flavors {', '.join(flavors)}; expected onnx, pytorch or "
            "python_function"
        )
    found.source = f"the MLflow model {path.resolve().name}"
    return found


def _described(path: Path) -> dict[str, Any]:
    try:
        described = yaml.safe_load((path / "MLmodel").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as exc:
        raise PackageError(f"{path / 'MLmodel'}: cannot be read: {exc}") from None
    if not isinstance(described, dict) or not isinstance(described.get("flavors"), dict):
        raise PackageError(f"{path / 'MLmodel'}: expected a mapping with `flavors`")
    return described


def _onnx(
    path: Path, flavor: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> Draft:
    from inferno.packaging import onnx_file

    # The graph declares the same tensors as MLflow's signature, and more reliably.
    return onnx_file.draft(_inside(path, flavor.get("data", "model.onnx")), inputs, outputs)


def _pytorch(
    path: Path,
    flavor: Mapping[str, Any],
    described: Mapping[str, Any],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> Draft:
    from inferno.packaging import torchscript_file

    file = _inside(path, flavor.get("model_data", "data")) / "model.pth"
    names = torchscript_file.argument_names(file)
    declared = inputs or _signature(path, described, "inputs", names)
    return torchscript_file.draft(file, declared, outputs)


def _python_function(
    path: Path,
    flavor: Mapping[str, Any],
    described: Mapping[str, Any],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> Draft:
    declared = list(inputs) or _signature(path, described, "inputs", ["inputs"])
    if not declared:
        raise PackageError(
            f"{path}: was logged without a signature; name its inputs, such as "
            "--input inputs:float64:batch,4"
        )
    files = {
        f"mlflow/{f.relative_to(path)}": _inside(path, f.relative_to(path))
        for f in path.rglob("*")
        if f.is_file()
    }
    columns = _is_columns(described)
    made = list(outputs) or _signature(path, described, "outputs", ["output"])
    return Draft(
        source=str(path),
        format="python",
        files={"model.py": Path(pyfunc_model.__file__), **files},
        entrypoint="model:build",
        inputs=declared,
        outputs=made,
        parameters={
            "loader_module": flavor["loader_module"],
            "data": flavor.get("data", ""),
            "code": flavor.get("code") or "",
            "columns": columns,
            "named": columns or len(declared) > 1 or _has_names(described),
            "outputs": [tensor.name for tensor in made],
        },
        notes=_requirements(str(flavor["loader_module"]), columns),
    )


def _requirements(loader_module: str, columns: bool) -> list[str]:
    """Return notes on the libraries that workers need."""
    notes = []
    if loader_module.startswith("mlflow"):
        notes.append(
            f"{loader_module} loads the model: install mlflow and the MLflow model's "
            "requirements.txt wherever its workers run."
        )
    if columns:
        notes.append("The inputs are columns: install pandas wherever the workers run.")
    return notes


def _inside(path: Path, name: object) -> Path:
    place = path / str(name)
    if not place.resolve().is_relative_to(path.resolve()) or not place.exists():
        raise PackageError(f"{path}: {name} does not exist in the folder, or leads out of it")
    return place


# -- Its signature ---------------------------------------------------------------------------------


def _specs(described: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    text = (described.get("signature") or {}).get(kind)
    specs = json.loads(text) if isinstance(text, str) else text
    return specs if isinstance(specs, list) else []


def _is_columns(described: Mapping[str, Any]) -> bool:
    return any(spec.get("type") != "tensor" for spec in _specs(described, "inputs"))


def _has_names(described: Mapping[str, Any]) -> bool:
    return any("name" in spec for spec in _specs(described, "inputs"))


def _signature(
    path: Path, described: Mapping[str, Any], kind: str, names: Sequence[str]
) -> list[Tensor]:
    """Return the tensors of MLflow's signature; tensors without a name get one of `names`."""
    found = []
    for place, spec in enumerate(_specs(described, kind)):
        default = names[place] if place < len(names) else f"{kind[:-1]}_{place}"
        name = str(spec.get("name", default))
        optional = kind == "inputs" and not spec.get("required", True)
        if spec.get("type") == "tensor":
            inner = spec["tensor-spec"]
            dtype = "string" if inner["dtype"] in ("object", "str") else inner["dtype"]
            shape: tuple[Dimension, ...] = tuple(n if n > 0 else None for n in inner["shape"])
        else:
            dtype, shape = _COLUMNS.get(spec.get("type", ""), ""), ("batch",)
        known = tensors.dtype_name(dtype)
        if known is None:
            raise PackageError(
                f"{path}: {name} has type {spec.get('type')} {dtype}".rstrip()
                + f"; expected tensors, or columns of {', '.join(_COLUMNS)}"
            )
        found.append(Tensor(name, known, shape, optional))
    return found
