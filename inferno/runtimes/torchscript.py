"""TorchScript modules, and how torch's tensors go in and out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from inferno.errors import PackageError
from inferno.protocol.tensors import Array, Tensors
from inferno.repository import Package
from inferno.runtimes.base import ModelContext, artifact, build


class TorchScriptRuntime:
    """One scripted or traced module.

    Inputs are passed by position: in the order of the signature, with None for an optional one that
    is not given, or in the order of what `preprocess` returns. A module returns a tensor, a tuple,
    or a dict; tensors without names get those of `parameters.output_names`, else those of the
    declared outputs.
    """

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Load `model.ts` on the context's device.

        Raises:
          PackageError: the file is missing or no TorchScript module.
        """
        path = artifact(package, "model.ts")
        torch.set_num_threads(context.threads)
        try:
            module = torch.jit.load(str(path), context.device)  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as exc:
            raise PackageError(f"{path}: cannot be loaded: {exc}") from exc
        self._module = module.eval()
        self._device = context.device
        self._inputs = [spec.name for spec in package.signature.inputs]
        declared = [spec.name for spec in package.signature.outputs]
        self._outputs: list[str] = list(context.parameters.get("output_names", declared))
        self.processor = (
            build(package, package.manifest.processor, context)
            if package.manifest.processor
            else None
        )

    def run(self, inputs: Tensors) -> Tensors:
        """Run the module without gradients."""
        names = self._inputs if inputs.keys() <= set(self._inputs) else list(inputs)
        arguments = (
            to_torch(inputs[name], self._device) if name in inputs else None for name in names
        )
        with inference():
            return named_outputs(self._module(*arguments), self._outputs)


@contextmanager
def inference() -> Iterator[None]:
    """Run torch without gradients; raise a MemoryError when the device is out of memory."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as exc:
        raise MemoryError(str(exc)) from exc


def to_torch(array: Array, device: str) -> torch.Tensor:
    """Give an array to torch, on a device; on the CPU it shares the array's memory if it can."""
    # Arrays made from a client's bytes are read-only, which torch cannot represent.
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


def named_outputs(result: Any, names: list[str]) -> Tensors:
    """Give a module's result its outputs' names.

    Args:
      result: a tensor, a tuple or list of tensors, or a dict of them by name.
      names: for tensors that come without one.
    Raises:
      ValueError: the number of tensors differs from the number of names.
    """
    if isinstance(result, dict):
        return {name: _to_numpy(tensor) for name, tensor in result.items()}
    tensors = list(result) if isinstance(result, tuple | list) else [result]
    if len(tensors) != len(names):
        raise ValueError(
            f"the module returned {len(tensors)} tensors for the outputs {', '.join(names)}"
        )
    return {name: _to_numpy(tensor) for name, tensor in zip(names, tensors, strict=True)}


def _to_numpy(tensor: torch.Tensor) -> Array:
    # numpy has no bfloat16.
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return tensor.cpu().numpy()
