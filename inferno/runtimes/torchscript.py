"""TorchScript modules."""

from __future__ import annotations

import numpy as np
import torch

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository import Package
from inferno.runtimes.base import ModelContext, artifact, build


class TorchScriptRuntime:
    """One scripted or traced module.

    Inputs are passed by position, in the order of the signature, or of what `preprocess` returns. A module returns a tensor, a
    tuple, or a dict; tensors without names get those of `parameters.output_names`, else those of the declared outputs.
    """

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Load `model.ts` on the context's device.

        Raises:
          PackageError: the file is missing or no TorchScript module.
        """
        path = artifact(package, "model.ts")
        torch.set_num_threads(context.threads)
        try:
            self._module = torch.jit.load(str(path), map_location=context.device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as exc:
            raise PackageError(f"{path}: cannot be loaded: {exc}") from exc
        self._device = context.device
        declared = [spec.name for spec in package.signature.outputs]
        self._outputs: list[str] = list(context.parameters.get("output_names", declared))
        self._order = {spec.name: i for i, spec in enumerate(package.signature.inputs)}
        self.processor = (
            build(package, package.manifest.processor, context) if package.manifest.processor else None
        )

    def run(self, inputs: Tensors) -> Tensors:
        """Run the module without gradients."""
        ordered = sorted(inputs, key=lambda name: self._order.get(name, 0))
        with torch.inference_mode():
            result = self._module(*(to_torch(inputs[name], self._device) for name in ordered))
        return named_outputs(result, self._outputs)


def to_torch(array: np.ndarray, device: str) -> torch.Tensor:  # type: ignore[type-arg]
    """Copy an array to a tensor on a device."""
    # Arrays made from a client's bytes are read-only, which torch cannot represent.
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


def named_outputs(result: object, names: list[str]) -> Tensors:
    """Give a module's result its outputs' names.

    Args:
      result: a tensor, a tuple or list of tensors, or a dict of them by name.
      names: for tensors that come without one.
    Raises:
      ValueError: the number of tensors differs from the number of names.
    """
    if isinstance(result, dict):
        return {name: tensor.cpu().numpy() for name, tensor in result.items()}
    tensors = list(result) if isinstance(result, tuple | list) else [result]
    if len(tensors) != len(names):
        raise ValueError(f"the module returned {len(tensors)} tensors for the outputs {', '.join(names)}")
    return {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
