"""Reads a TorchScript file, which tells names but neither dtypes nor shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from inferno.errors import PackageError
from inferno.packaging.draft import Draft, Tensor


def draft(path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Draft:
    """Read a TorchScript file; see `inferno.packaging.reading.read`.

    Raises:
      PackageError: the file is not TorchScript, or an input is not described.
    """
    schema = _schema(path)
    return Draft(
        source=path.name,
        format="torchscript",
        files={"model.pt": path},
        artifact="model.pt",
        inputs=_inputs(path, schema, {tensor.name: tensor for tensor in inputs}),
        outputs=list(outputs) or [Tensor(name, "float32", None) for name in _outputs(schema)],
    )


def argument_names(path: Path) -> list[str]:
    """Return the names of the arguments of a TorchScript file's `forward`.

    Raises:
      PackageError: the file is not TorchScript.
    """
    return [argument.name for argument in _schema(path).arguments[1:]]


def _schema(path: Path) -> Any:
    try:
        return torch.jit.load(str(path), "cpu").forward.schema  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as exc:
        reason = str(exc).splitlines()[0].rstrip(".")
        raise PackageError(
            f"{path}: not a TorchScript file: {reason}. A file from torch.save needs the model's "
            "classes; use torch.jit.trace(...).save(), torch.onnx.export, or a model.py"
        ) from None


def _inputs(path: Path, schema: Any, described: dict[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    names: list[str] = []
    for argument in schema.arguments[1:]:
        kind = str(argument.type)
        if kind in ("Tensor", "Optional[Tensor]"):
            names.append(argument.name)
            if argument.name in described:
                given = described[argument.name]
                optional = kind != "Tensor"
                found.append(Tensor(given.name, given.dtype, given.shape, optional))
        elif not argument.has_default_value():
            raise PackageError(
                f"{path}: forward takes {argument.name} of type {kind}; only tensors can be sent"
            )
    unknown = described.keys() - set(names)
    if unknown:
        raise PackageError(
            f"{path}: forward takes no {', '.join(sorted(unknown))}; it takes {', '.join(names)}"
        )
    missing = [name for name in names if name not in described]
    if missing:
        example = " ".join(f"--input {name}:float32:batch,3" for name in missing)
        raise PackageError(
            f"{path}: forward takes {', '.join(names)}, but the file does not tell their dtypes "
            f"and shapes; name them, such as {example}"
        )
    return found


def _outputs(schema: Any) -> list[str]:
    """Return names for the outputs of `forward`; none for a dict, whose keys are the names."""
    kind = schema.returns[0].type
    if kind.kind() == "DictType":
        return []
    if kind.kind() != "TupleType":
        return ["output"]
    return [f"output_{place}" for place in range(len(kind.elements()))]
