"""Models written in Python: an entry point that builds a callable."""

from __future__ import annotations

import sys

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository import Package
from inferno.runtimes.base import ModelContext, build


class PythonRuntime:
    """A callable of the package's own: ``model(inputs: dict of arrays) -> dict of arrays``.

    A `torch.nn.Module` is called with its inputs as keyword arguments, as tensors, without
    gradients.
    """

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Build the model.

        Raises:
          PackageError: there is no entry point, it raised, or what it built cannot be called.
        """
        entrypoint = package.manifest.entrypoint
        if entrypoint is None:
            raise PackageError(
                f"{package.path}: entrypoint: missing; format python needs `module:function`"
            )
        model = build(package, entrypoint, context)
        if not callable(model):
            raise PackageError(
                f"{package.path}: {entrypoint} returned {type(model).__name__}, no callable"
            )
        self.processor: object | None = model
        self._model = model
        # Only a package that imported torch itself can have built a module of it.
        torch = sys.modules.get("torch")
        self._is_module = False
        self._device = context.device
        self._outputs = [spec.name for spec in package.signature.outputs]
        if torch is not None and isinstance(model, torch.nn.Module):
            self._is_module = True
            torch.set_num_threads(context.threads)
            model.to(context.device).eval()

    def run(self, inputs: Tensors) -> Tensors:
        """Call the model with one batch."""
        if not self._is_module:
            outputs: Tensors = self._model(inputs)
            return outputs
        from inferno.runtimes.torchscript import inference, named_outputs, to_torch

        with inference():
            result = self._model(
                **{name: to_torch(array, self._device) for name, array in inputs.items()}
            )
        return named_outputs(result, self._outputs)
