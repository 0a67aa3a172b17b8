"""Runs torch modules: device, precision, threads, and conversion of inputs and outputs."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from inferno.protocol.tensors import Array, Tensors
from inferno.runtimes.base import ModelContext, UnsuitablePrecision

logger = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ModuleRunner:
    """A module on its device; several executors may run it at the same time."""

    #: Backend of torch.compile.
    BACKEND: str | Callable[..., Any] = "inductor"

    def __init__(self, module: torch.nn.Module, context: ModelContext) -> None:
        """Move a module to its device and into its precision.

        Raises:
          UnsuitablePrecision: the module cannot run in the requested precision.
        """
        self._device = torch.device(context.device)
        self._threads = context.threads
        self._dtype = _DTYPES.get(context.quantize)
        #: One CUDA stream per executor, so that copies of one overlap with the pass of another.
        self._local = threading.local()
        module = module.eval()
        if context.quantize == "int8":
            module = _int8(module, context)
        if context.quantize == "fp16" and self._device.type == "cpu":
            raise UnsuitablePrecision(
                f"{context.path}: quantize: fp16 is for CUDA; on the CPU, use bf16 or int8"
            )
        self._module = module.to(self._device, self._dtype)
        self._compiled = None
        if context.compile and not isinstance(module, torch.jit.ScriptModule):
            # Dynamic, because batches have many shapes, each of which would be compiled separately.
            self._compiled = torch.compile(self._module, dynamic=True, backend=self.BACKEND)

    @property
    def memory_bytes(self) -> int:
        """Size of the weights in bytes."""
        tensors = [*self._module.parameters(), *self._module.buffers()]
        for layer in self._module.modules():
            # A quantised layer packs its weights, and returns them by a method.
            weight = getattr(layer, "weight", None)
            if callable(weight):
                tensors.append(weight())
        return sum(tensor.nbytes for tensor in tensors)

    def run(self, names: Sequence[str], *args: Array | None, **kwargs: Array) -> Tensors:
        """Run the module with arrays, without gradients.

        Args:
          names: names of the outputs, for modules that return tensors without names.
          args: the module's positional arguments.
          kwargs: the module's keyword arguments.
        Raises:
          MemoryError: the device is out of memory.
          ValueError: the number of tensors differs from the number of names.
        """
        # Torch keeps the number per calling thread, and a new thread starts with the last one set.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        stream = self._stream()
        with _inference(), torch.cuda.stream(stream):
            result = self._call(
                [None if array is None else self._to_device(array) for array in args],
                {name: self._to_device(array) for name, array in kwargs.items()},
            )
            outputs = {n: _to_host(tensor) for n, tensor in _named(result, names).items()}
            # The executor waits for the device only here.
            if stream is not None:
                stream.synchronize()
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    def _call(self, args: list[torch.Tensor | None], kwargs: dict[str, torch.Tensor]) -> Any:
        compiled = self._compiled
        if compiled is None:
            return self._module(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:
            # If the module itself is at fault, this raises the error again.
            result = self._module(*args, **kwargs)
            self._compiled = None
            reason = " ".join(str(exc).split())
            logger.warning("runs without torch.compile, which failed: %.300s", reason)
            return result

    def _stream(self) -> torch.cuda.Stream | None:
        if self._device.type != "cuda":
            return None
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._local.stream
        return stream

    def _to_device(self, array: Array) -> torch.Tensor:
        # Arrays made from a client's bytes are read-only, which torch does not support.
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self._device.type == "cuda":
            # Only copies from pinned memory overlap with computation. Torch reuses pinned blocks.
            tensor = tensor.pin_memory()
        tensor = tensor.to(self._device, non_blocking=True)
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    # numpy has no bfloat16.
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    # A non-blocking copy goes to pinned memory.
    return tensor.to("cpu", non_blocking=True)


def _int8(module: torch.nn.Module, context: ModelContext) -> torch.nn.Module:
    if context.device != "cpu":
        raise UnsuitablePrecision(f"{context.path}: quantize: int8 is for the CPU; use fp16")
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsuitablePrecision(
            f"{context.path}: quantize: a TorchScript module cannot be made int8; use bf16"
        )
    with warnings.catch_warnings():
        # It is deprecated in torch; its successor is a package of its own.
        warnings.simplefilter("ignore")
        try:
            quantised: torch.nn.Module = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
                module, {torch.nn.Linear}, dtype=torch.qint8, inplace=True
            )
        except AttributeError as exc:
            raise UnsuitablePrecision(
                f"{context.path}: quantize: this torch has no dynamic int8: {exc}"
            ) from exc
    return quantised


@contextmanager
def _inference() -> Iterator[None]:
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as exc:
        raise MemoryError(str(exc)) from exc


def _named(result: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return a module's result by name: a tensor, several, or a dict of them."""
    if isinstance(result, dict):
        return result
    tensors = list(result) if isinstance(result, tuple | list) else [result]
    if len(tensors) != len(names):
        raise ValueError(
            f"the module returned {len(tensors)} tensors for the outputs {', '.join(names)}"
        )
    return dict(zip(names, tensors, strict=True))
