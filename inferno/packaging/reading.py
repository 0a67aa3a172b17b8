"""Reads an artifact into a draft of its package, by the kind of the artifact."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from inferno.errors import PackageError
from inferno.packaging import python_code
from inferno.packaging.draft import Draft, Tensor

#: Reads an artifact; the tensors are the inputs and outputs that its owner describes.
Reader = Callable[[Path, Sequence[Tensor], Sequence[Tensor]], Draft]

#: Reader by kind of file. Readers are imported on demand, because they import large libraries.
_READERS = {
    ".onnx": "inferno.packaging.onnx_file",
    ".pt": "inferno.packaging.torchscript_file",
    ".pth": "inferno.packaging.torchscript_file",
    ".ts": "inferno.packaging.torchscript_file",
    "MLmodel": "inferno.packaging.mlflow_folder",
}


def read(source: str, inputs: Sequence[Tensor] = (), outputs: Sequence[Tensor] = ()) -> Draft:
    """Read an artifact into a draft of its package.

    Args:
      source: a file, an MLflow model's folder, or `module:function` of a Python file.
      inputs: inputs that the owner describes; they replace those of the artifact.
      outputs: outputs that the owner describes; they replace those of the artifact.
    Raises:
      PackageError: no package can be made from the artifact; the message tells why.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "MLmodel").is_file():
            raise PackageError(
                f"{source}: a folder without the file MLmodel; expected a file of {_kinds()}, an "
                "MLflow model's folder or module:function"
            )
        return _reader("MLmodel")(path, inputs, outputs)
    if path.suffix in _READERS:
        if not path.is_file():
            raise PackageError(f"{source}: the file does not exist")
        return _reader(path.suffix)(path, inputs, outputs)
    if re.fullmatch(r".*[^:]:\w+", source):
        return python_code.draft(source, inputs, outputs)
    raise PackageError(
        f"{source}: expected a file of {_kinds()}, an MLflow model's folder or module:function"
    )


def _kinds() -> str:
    return ", ".join(kind for kind in _READERS if kind.startswith("."))


def _reader(kind: str) -> Reader:
    return cast(Reader, importlib.import_module(_READERS[kind]).draft)
