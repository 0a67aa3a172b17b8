"""Finding out what kind of artifact something is, and reading it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from inferno.errors import PackageError
from inferno.packaging import python_code
from inferno.packaging.draft import Draft, Tensor

#: Reads an artifact; the tensors are what its owner says of the inputs and outputs.
Reader = Callable[[Path, Sequence[Tensor], Sequence[Tensor]], Draft]

#: The reader of each kind of file. They are imported when they are needed: they load libraries.
_READERS = {
    ".onnx": "inferno.packaging.onnx_file",
    ".pt": "inferno.packaging.torchscript_file",
    ".pth": "inferno.packaging.torchscript_file",
    ".ts": "inferno.packaging.torchscript_file",
    "MLmodel": "inferno.packaging.mlflow_folder",
}


def read(source: str, inputs: Sequence[Tensor] = (), outputs: Sequence[Tensor] = ()) -> Draft:
    """Read what a package can be made from.

    Args:
      source: a file, an MLflow model's folder, or `module:function` of a Python file.
      inputs: what its owner says of its inputs; it goes before what the artifact says.
      outputs: the same of its outputs.
    Raises:
      PackageError: nothing can be made from it; says why.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "MLmodel").is_file():
            raise PackageError(
                f"{source}: is a folder without the file MLmodel; expected a file of "
                f"{_kinds()}, an MLflow model's folder or module:function"
            )
        return _reader("MLmodel")(path, inputs, outputs)
    if path.suffix in _READERS:
        if not path.is_file():
            raise PackageError(f"{source}: there is no such file")
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
