"""Runtime of models written in Python: an entry point builds a callable."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository.package import Package
from inferno.runtimes.base import ModelContext, UnsuitablePrecision, build, build_processor

if TYPE_CHECKING:
    from inferno.runtimes.modules import ModuleRunner


class PythonRuntime:
    """The package's own callable: ``model(inputs: dict of arrays) -> dict of arrays``.

    A `torch.nn.Module` is called without gradients, with its inputs as tensors in keyword
    arguments.
    """

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Build the model.

        Raises:
          PackageError: there is no entry point, it raised an error, or its result is not callable.
        """
        entrypoint = package.manifest.entrypoint
        if entrypoint is None:
            raise PackageError(
                f"{package.path}: entrypoint: missing; format python needs `module:function`"
            )
        model = build(package, entrypoint, context)
        if not callable(model):
            raise PackageError(
                f"{package.path}: {entrypoint} returned {type(model).__name__}, not a callable"
            )
        self.processor = build_processor(package, context) or model
        self._model = model
        self._runner: ModuleRunner | None = None
        self._outputs = [spec.name for spec in package.signature.outputs]
        # Without torch in `sys.modules`, the package cannot have built a torch module.
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(model, torch.nn.Module):
            from inferno.runtimes.modules import ModuleRunner

            self._runner = ModuleRunner(model, context)
        elif context.quantize != "none":
            raise UnsuitablePrecision(
                f"{package.path}: quantize: {context.quantize}: only a torch module can be loaded "
                "in another precision; other Python models do it themselves"
            )

    @property
    def memory_bytes(self) -> int:
        """Size of a module's weights in bytes; 0 for other callables, whose size is unknown."""
        return self._runner.memory_bytes if self._runner else 0

    def run(self, inputs: Tensors) -> Tensors:
        """Call the model with one batch."""
        if self._runner is not None:
            return self._runner.run(self._outputs, **inputs)
        outputs: Tensors = self._model(inputs)
        return outputs
