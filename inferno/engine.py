"""One loaded version of a model: load, warm up, and answer batches.

prepare    each member's own preprocessing
forward    collate -> one forward pass -> postprocess -> check -> split
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from inferno.errors import ForwardFailed, InvalidInput, PackageError
from inferno.protocol.signature import BATCH, Limits, TensorSpec
from inferno.protocol.tensors import NUMERIC, Array, Tensors
from inferno.repository import Package
from inferno.runtimes import ModelContext, load_runtime
from inferno.settings import BatchingSettings, InferenceSettings

logger = logging.getLogger(__name__)

#: Warm-up samples are the operator's own and not bounded like clients' inputs.
_UNBOUNDED = Limits(text_bytes=2**31, image_bytes=2**31, rows=2**31)


class Engine:
    """One version, ready for forward passes; safe to use from several threads if its runtime is."""

    def __init__(
        self, package: Package, batching: BatchingSettings, inference: InferenceSettings
    ) -> None:
        """Load the package's artifact and code.

        Raises:
          PackageError: the package cannot be loaded; says why.
        """
        self.package = package
        manifest = package.manifest
        self.max_batch_size = package.max_batch_size(batching.max_batch_size)
        context = ModelContext(
            path=package.path.resolve(),
            device=choose_device(inference.device),
            threads=inference.threads or len(os.sched_getaffinity(0)),
            parameters=manifest.parameters,
            labels=manifest.labels,
        )
        self.device = context.device
        self._runtime = load_runtime(package, context)
        self._preprocess = getattr(self._runtime.processor, "preprocess", None)
        self._postprocess = getattr(self._runtime.processor, "postprocess", None)

    def warm_up(self) -> None:
        """Run one forward pass of every batch size that is a power of two, and of the largest.

        Raises:
          PackageError: the sample does not fit the signature, or the model fails on it.
        """
        started = time.monotonic()
        sizes = sorted(
            {2**k for k in range(self.max_batch_size.bit_length())} | {self.max_batch_size}
        )
        try:
            sample = self.prepare(self._sample())
            for size in sizes:
                self.forward([sample] * size)
        except Exception as exc:
            raise PackageError(
                f"{self.package.path}: fails on its warm-up sample: {type(exc).__name__}: {exc}"
            ) from exc
        logger.info(
            "warmed up %s version %s on %s: batches of %s in %.1f s",
            self.package.name, self.package.version, self.device, ", ".join(map(str, sizes)),
            time.monotonic() - started,
        )  # fmt: skip

    def _sample(self) -> Tensors:
        """Return inputs of one row."""
        signature = self.package.signature
        given = self.package.manifest.warm_up.inputs
        if given is not None:
            sample = signature.parse(given, _UNBOUNDED)
            return next(chunks(sample, 1)) if signature.batched else sample
        wanted = [spec for spec in signature.inputs if not spec.optional]
        wanted += map(signature.input, signature.one_of[:1])
        return {spec.name: _made_up(spec) for spec in wanted or signature.inputs[:1]}

    def prepare(self, inputs: Tensors) -> Tensors:
        """Preprocess the inputs of one task.

        Args:
          inputs: arrays by name, as `Signature.parse` returns them.
        Returns:
          What the artifact takes, with the rows of the task as the first dimension.
        Raises:
          InvalidInput: the model's own code finds the input wrong (ValueError).
        """
        if self._preprocess is None:
            return inputs
        try:
            return cast(Tensors, self._preprocess(inputs))
        except ValueError as exc:
            raise InvalidInput(str(exc), "inputs") from exc

    def forward(self, members: Sequence[Tensors]) -> list[Tensors]:
        """Answer prepared members with one forward pass.

        Args:
          members: what `prepare` returned for each task; together at most `max_batch_size` rows.
        Returns:
          The declared outputs of each member, in the same order.
        Raises:
          ForwardFailed: the outputs do not match the signature or the number of rows.
          Exception: whatever the model raises.
        """
        rows = [count_rows(member) for member in members]
        outputs = self._runtime.run(self._collate(members))
        if self._postprocess is not None:
            outputs = self._postprocess(outputs)
        if not isinstance(outputs, dict):
            raise ForwardFailed(
                f"the model gave {type(outputs).__name__}, expected outputs by name"
            )
        checked = self._check(outputs, sum(rows))
        if not self.package.signature.batched:
            return [checked]
        ends = np.cumsum(rows).tolist()
        return [
            {name: array[end - n : end] for name, array in checked.items()}
            for end, n in zip(ends, rows, strict=True)
        ]

    def _collate(self, members: Sequence[Tensors]) -> Tensors:
        if len(members) == 1:
            return members[0]
        pad = self.package.manifest.batching.pad
        return {
            name: _stack([member[name] for member in members], pad.get(name)) for name in members[0]
        }

    def _check(self, outputs: Tensors, rows: int) -> Tensors:
        checked = {}
        for spec in self.package.signature.outputs:
            array = outputs.get(spec.name)
            if array is None:
                if spec.optional:
                    continue
                given = ", ".join(outputs) or "none"
                raise ForwardFailed(f"the model gave no output {spec.name!r}; it gave {given}")
            checked[spec.name] = _conform(array, spec, rows)
        return checked


def choose_device(wanted: str) -> str:
    """Return `cuda` or `cpu`.

    Args:
      wanted: `auto` takes CUDA where torch can use it; torch is only loaded to be asked where the
        machine has an NVIDIA driver.
    Raises:
      PackageError: `cuda` is demanded and there is none.
    """
    if wanted == "cpu":
        return "cpu"
    available = os.path.exists("/dev/nvidiactl") and _cuda_works()
    if wanted == "cuda" and not available:
        raise PackageError(
            "INFERNO_INFERENCE__DEVICE=cuda, but no usable CUDA device was found; use auto or cpu"
        )
    return "cuda" if available else "cpu"


def _cuda_works() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def count_rows(inputs: Tensors) -> int:
    """Return the rows of a task: the first dimension of its inputs."""
    first = next(iter(inputs.values()))
    return len(first) if first.ndim else 1


def _stack(arrays: list[Array], pad: float | None) -> Array:
    if pad is None or len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    longest = np.max([array.shape[1:] for array in arrays], axis=0)
    out = np.full((sum(map(len, arrays)), *longest), pad, dtype=arrays[0].dtype)
    start = 0
    for array in arrays:
        out[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
        start += len(array)
    return out


def _conform(output: Any, spec: TensorSpec, rows: int) -> Array:
    array: Array = np.asarray(output)
    if spec.batched and (array.ndim == 0 or len(array) != rows):
        got = len(array) if array.ndim else "a scalar"
        raise ForwardFailed(f"output {spec.name!r} has {got} rows for {rows} rows of input")
    if array.ndim != len(spec.shape) or any(
        isinstance(dim, int) and dim != size
        for dim, size in zip(spec.shape, array.shape, strict=True)
    ):
        raise ForwardFailed(
            f"output {spec.name!r} has shape {list(array.shape)}, declared is {list(spec.shape)}"
        )
    if spec.dtype in NUMERIC:
        return _numeric(array, spec)
    # numpy's own kinds of text and bytes, or Python's as objects.
    kind, element = ("U", str) if spec.dtype == "string" else ("S", bytes)
    if array.dtype.kind != kind and not all(isinstance(item, element) for item in array.flat):
        raise ForwardFailed(f"output {spec.name!r} holds {array.dtype}, declared is {spec.dtype}")
    return array


def _numeric(array: Array, spec: TensorSpec) -> Array:
    if array.dtype.kind not in "biuf":
        raise ForwardFailed(
            f"output {spec.name!r} has dtype {array.dtype}, declared is {spec.dtype}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(NUMERIC[spec.dtype], copy=False)
    if converted.dtype.kind == "f":
        if not np.isfinite(converted).all():
            raise ForwardFailed(f"output {spec.name!r} holds NaN or infinity")
    elif converted.dtype != array.dtype and not np.array_equal(converted, array):
        raise ForwardFailed(
            f"output {spec.name!r} has {array.dtype} values that are no {spec.dtype}"
        )
    return converted


def _made_up(spec: TensorSpec) -> Array:
    shape = tuple(dim if isinstance(dim, int) else (1 if dim == BATCH else 8) for dim in spec.shape)
    if spec.dtype in NUMERIC:
        return np.zeros(shape, NUMERIC[spec.dtype])
    array = np.empty(math.prod(shape), dtype=object)
    array[:] = "warm up" if spec.dtype == "string" else b"warm up"
    return array.reshape(shape)


def chunks(inputs: Tensors, rows: int) -> Iterator[Tensors]:
    """Cut the inputs of a task into pieces of at most so many rows."""
    for start in range(0, count_rows(inputs), rows):
        yield {name: array[start : start + rows] for name, array in inputs.items()}
