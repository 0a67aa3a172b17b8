"""The interface between an engine and a runtime, and the loading of a package's own code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

from pydantic import BaseModel, ValidationError

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository.manifest import explain
from inferno.repository.package import Package, is_import

#: Module and class of each `format`.
RUNTIMES = {
    "onnx": "inferno.runtimes.onnx:OnnxRuntime",
    "torchscript": "inferno.runtimes.torchscript:TorchScriptRuntime",
    "python": "inferno.runtimes.python:PythonRuntime",
    "transformers": "inferno.runtimes.transformers:TransformersRuntime",
}


Parameters = TypeVar("Parameters", bound=BaseModel)


class UnsuitablePrecision(PackageError):
    """The artifact cannot run in the requested precision."""


@dataclass(frozen=True)
class ModelContext:
    """What a package's own code receives when it is built."""

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
    #: Requested precision: `none` (the artifact's own), `int8`, `fp16` or `bf16`.
    quantize: str = "none"
    #: Whether to compile torch modules.
    compile: bool = False
    #: ONNX Runtime's execution providers from the settings; empty if `device` decides.
    onnx_providers: tuple[str, ...] = ()


class Runtime(Protocol):
    """One loaded artifact."""

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Load the artifact; a PackageError says what is wrong with it."""

    def run(self, inputs: Tensors) -> Tensors:
        """Run one batch.

        Args:
          inputs: arrays by name, with the rows of the whole batch as the first dimension.
        Returns:
          The raw outputs by name, with the same number of rows.
        """

    @property
    def processor(self) -> object | None:
        """The package's own object with `preprocess` and `postprocess`, if it has one."""

    @property
    def memory_bytes(self) -> int:
        """Size of the weights in bytes, as far as it is known."""


def find_runtime(package: Package) -> type[Runtime]:
    """Import the runtime that a package's `format` names.

    Raises:
      PackageError: the format is unknown, or a library is missing.
    """
    place = RUNTIMES.get(package.manifest.format)
    if place is None:
        raise PackageError(
            f"{package.path}: format: {package.manifest.format!r}: "
            f"expected one of {', '.join(RUNTIMES)}"
        )
    module, _, name = place.partition(":")
    try:
        return cast(type[Runtime], getattr(importlib.import_module(module), name))
    except ImportError as exc:
        raise PackageError(
            f"{package.path}: format {package.manifest.format} needs a missing library: {exc}"
        ) from exc


def artifact(package: Package, default: str) -> Path:
    """Return the path of a package's artifact.

    Raises:
      PackageError: the file is missing.
    """
    path = package.path / (package.manifest.artifact or default)
    if not path.is_file():
        raise PackageError(
            f"{path} is missing; "
            f"`inferno models prepare {package.name}` makes shipped models' artifacts"
        )
    return path


def build_processor(package: Package, context: ModelContext) -> object | None:
    """Build the object that a package's `processor` names, if it names one.

    Raises:
      PackageError: the module or function is missing, or the function raised an error.
    """
    processor = package.manifest.processor
    return build(package, processor, context) if processor else None


def read_parameters(kind: type[Parameters], context: ModelContext) -> Parameters:
    """Read the `parameters` of a package into a pydantic model.

    Raises:
      PackageError: a parameter is invalid; names it, its value and the expectation.
    """
    try:
        return kind.model_validate(context.parameters)
    except ValidationError as exc:
        found = (f"{context.path}: parameters.{explain(error)}" for error in exc.errors())
        raise PackageError("; ".join(found)) from None


def build(package: Package, entrypoint: str, context: ModelContext) -> Any:
    """Call a `module:function` with a package's context.

    A module with dots and without a slash, such as `inferno.processors.yolo`, is imported; any
    other is a file, relative to the version's folder.

    Raises:
      PackageError: the module or function is missing, or the function raised an error.
    """
    name, _, function = entrypoint.partition(":")
    try:
        if is_import(entrypoint):
            return getattr(importlib.import_module(name), function)(context)
        module = _load((package.path / f"{name}.py").resolve())
        try:
            built = getattr(module, function)(context)
        except BaseException:
            _forget(module.__name__)
            raise
    except PackageError:
        raise
    except Exception as exc:
        raise PackageError(f"{package.path}: {entrypoint}: {type(exc).__name__}: {exc}") from exc
    with contextlib.suppress(TypeError):  # Some objects cannot have weak references.
        weakref.finalize(built, _forget, module.__name__).atexit = False
    return built


#: Numbers the modules, so that a reloaded engine sees changed files, and packages share no modules.
_number = itertools.count(1)


def _load(file: Path) -> ModuleType:
    name = f"inferno_package_{next(_number)}"
    # A search path makes it a Python package, so that `from .sibling import x` works.
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(file.parent)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        _forget(name)
        raise
    return module


def _forget(name: str) -> None:
    """Remove a package's module and its siblings from `sys.modules`."""
    for found in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        sys.modules.pop(found, None)
