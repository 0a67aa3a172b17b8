"""Runtime of TorchScript modules."""

from __future__ import annotations

import torch

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository.package import Package
from inferno.runtimes.base import ModelContext, artifact, build_processor
from inferno.runtimes.modules import ModuleRunner


class TorchScriptRuntime:
    """One scripted or traced module.

    Inputs are passed by position: in the order of the signature, with None for a missing optional
    input, or in the order in which `preprocess` returns them. A module returns a tensor, a tuple or
    a dict. Tensors without names get the names in `parameters.output_names`, or else the names of
    the declared outputs.
    """

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Load `model.ts` on the context's device.

        Raises:
          PackageError: the file is missing, or is not a TorchScript module.
        """
        path = artifact(package, "model.ts")
        try:
            module = torch.jit.load(str(path), context.device)  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as exc:
            raise PackageError(f"{path}: cannot be loaded: {exc}") from exc
        self._runner = ModuleRunner(module, context)
        self._inputs = [spec.name for spec in package.signature.inputs]
        declared = [spec.name for spec in package.signature.outputs]
        self._outputs: list[str] = list(context.parameters.get("output_names", declared))
        self.processor = build_processor(package, context)

    @property
    def memory_bytes(self) -> int:
        """Size of the weights in bytes."""
        return self._runner.memory_bytes

    def run(self, inputs: Tensors) -> Tensors:
        """Run the module without gradients."""
        names = self._inputs if inputs.keys() <= set(self._inputs) else list(inputs)
        return self._runner.run(self._outputs, *(inputs.get(name) for name in names))
