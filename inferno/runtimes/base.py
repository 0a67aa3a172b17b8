"""The protocol between an engine and a runtime, and how a package's own code is loaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository import Package

#: Where the class of each `format` is found.
RUNTIMES = {
    "onnx": "inferno.runtimes.onnx:OnnxRuntime",
    "torchscript": "inferno.runtimes.torchscript:TorchScriptRuntime",
    "python": "inferno.runtimes.python:PythonRuntime",
}


@dataclass(frozen=True)
class ModelContext:
    """What a package's own code is told when it is built."""

    #: The version's folder.
    path: Path
    #: `cpu` or `cuda`.
    device: str
    #: Threads that one forward pass may use.
    threads: int
    #: `parameters` of the manifest.
    parameters: Mapping[str, Any]
    #: `labels` of the manifest.
    labels: tuple[str, ...]


class Runtime(Protocol):
    """One loaded artifact."""

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Load the artifact; a PackageError says what is wrong with it."""

    def run(self, inputs: Tensors) -> Tensors:
        """Run one batch.

        Args:
          inputs: by name, each with the rows of the whole batch as its first dimension.
        Returns:
          The raw outputs by name, with as many rows.
        """

    @property
    def processor(self) -> object | None:
        """The package's own object with `preprocess` and `postprocess`, if it has one."""


def load_runtime(package: Package, context: ModelContext) -> Runtime:
    """Load a package with the runtime that its `format` names.

    Raises:
      PackageError: there is no such runtime, its library is missing, or the artifact cannot be
        loaded.
    """
    place = RUNTIMES.get(package.manifest.format)
    if place is None:
        raise PackageError(
            f"{package.path}: format: {package.manifest.format!r}: "
            f"expected one of {', '.join(RUNTIMES)}"
        )
    module, _, name = place.partition(":")
    try:
        runtime = getattr(importlib.import_module(module), name)
    except ImportError as exc:
        raise PackageError(
            f"{package.path}: format {package.manifest.format} needs a missing library: {exc}"
        ) from exc
    return cast(Runtime, runtime(package, context))


def artifact(package: Package, default: str) -> Path:
    """Return the path of a package's artifact.

    Raises:
      PackageError: it is not there.
    """
    path = package.path / (package.manifest.artifact or default)
    if not path.is_file():
        raise PackageError(
            f"{path} is missing; "
            f"`inferno models prepare {package.name}` makes shipped models' artifacts"
        )
    return path


def build(package: Package, entrypoint: str, context: ModelContext) -> Any:
    """Call a package's `module:function` with its context.

    Raises:
      PackageError: the module or function is not there, or it raised.
    """
    module_name, _, function = entrypoint.partition(":")
    file = (package.path / f"{module_name}.py").resolve()
    try:
        return _function(file, function)(context)
    except Exception as exc:
        raise PackageError(f"{package.path}: {entrypoint}: {type(exc).__name__}: {exc}") from exc


def _function(file: Path, name: str) -> Callable[[ModelContext], Any]:
    # Two packages may each have a `model.py`, so the module's name is made from the whole path.
    unique = f"inferno_package_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    module = sys.modules.get(unique)
    if module is None:
        # With a search path it is a package, so that `from .sibling import x` finds the file beside
        # it; two packages may each have a `sibling.py`, too.
        spec = importlib.util.spec_from_file_location(
            unique, file, submodule_search_locations=[str(file.parent)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is no Python module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[unique] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[unique]
            raise
    return cast(Callable[[ModelContext], Any], getattr(module, name))
