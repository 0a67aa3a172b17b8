"""One loaded version of a model: load, warm up, and answer batches.

prepare    each member's own preprocessing
forward    group by length -> for each group: collate -> run -> postprocess -> check -> split
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, cast

import numpy as np

from inferno.batching.latency import LatencyCurve, Pass
from inferno.engine import memory
from inferno.errors import ForwardFailed, InvalidInput, PackageError
from inferno.protocol.signature import BATCH, Limits, TensorSpec
from inferno.protocol.tensors import NUMERIC, Array, Tensors
from inferno.repository.repository import Package
from inferno.runtimes import ModelContext, Runtime, UnsuitablePrecision, find_runtime
from inferno.settings import BatchingSettings, InferenceSettings

logger = logging.getLogger(__name__)

#: Warm-up samples are the operator's own and not bounded like clients' inputs.
_UNBOUNDED = Limits(text_bytes=2**31, image_bytes=2**31, rows=2**31)


class Engine:
    """One version, ready for forward passes; safe to use from several threads if its runtime is."""

    #: Warming up measures each batch size up to so many times, while this many seconds are not
    #: over. Each is run once in any case.
    MEASUREMENTS = 7
    MEASURING_S = 1.0
    #: Weight of the newest batch in the mean length of rows.
    WEIGHT = 0.05

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
        #: Seconds of a forward pass by its size, see `size`.
        self.latency = LatencyCurve()
        self._length = 1.0
        inference = package.inference(inference)
        context = ModelContext(
            path=package.path.resolve(),
            device=choose_device(inference.device),
            threads=inference.pass_threads(package.executors),
            parameters=manifest.parameters,
            labels=manifest.labels,
            quantize=inference.quantize,
            compile=inference.compile,
            onnx_providers=inference.onnx_providers,
        )
        self.device = context.device
        kind = find_runtime(package)
        # Libraries stay when an engine goes, so they are loaded before. What was freed earlier and
        # is taken now would not count.
        memory.trim()
        self._resident_before = memory.resident_bytes()
        self._runtime = self._load(kind, context)
        self._measure_memory()
        self._preprocess = getattr(self._runtime.processor, "preprocess", None)
        self._postprocess = getattr(self._runtime.processor, "postprocess", None)
        batching_ = manifest.batching
        #: What each tensor that is padded is padded with.
        self._pad: dict[str, float | str] = dict.fromkeys(batching_.mask.values(), 0)
        self._bypass: tuple[str, ...] = ()
        self._sample = None
        if self._preprocess is not None:
            self._pad |= getattr(self._runtime.processor, "padding", {})
            self._bypass = getattr(self._runtime.processor, "bypass", ())
            self._sample = getattr(self._runtime.processor, "sample", None)
        self._pad |= batching_.pad
        #: Declared inputs that are padded, and the outputs that have dimensions of theirs.
        self._padded = [spec for spec in package.signature.inputs if spec.name in self._pad]
        #: Of those, the dimensions after the rows that have a declared size, by their places.
        self._fixed = {
            spec.name: {n for n, dim in enumerate(spec.shape[1:]) if isinstance(dim, int)}
            for spec in self._padded
        }
        dimensions = {dim for spec in self._padded for dim in spec.shape[1:]}
        self._cut = [s for s in package.signature.outputs if dimensions & {*s.shape[1:]}]

    def _load(self, kind: type[Runtime], context: ModelContext) -> Runtime:
        try:
            return kind(self.package, context)
        except UnsuitablePrecision as exc:
            # What the settings want of all models is done where it can be.
            if self.package.manifest.inference.quantize is not None:
                raise
            logger.warning("loaded in its own precision: %s", exc)
            return kind(self.package, replace(context, quantize="none"))

    def _measure_memory(self) -> None:
        #: What the engine holds, in bytes: the size of its weights; on the CPU, by how much the
        #: process grew while it was loaded and warmed up, if that is more. What else was allocated
        #: meanwhile counts as well; what a pass allocates and frees again does not.
        self.memory_bytes = self._runtime.memory_bytes
        if self.device == "cpu":
            # What a conversion has freed again does not count.
            memory.trim()
            grown = memory.resident_bytes() - self._resident_before
            self.memory_bytes = max(self.memory_bytes, grown)

    def close(self) -> None:
        """Give back what the engine holds; no pass may be under way, and none can follow.

        A `close` method of the package's own object is called.
        """
        runtime = self.__dict__.pop("_runtime", None)
        if runtime is None:
            return
        # What was freed before does not count as freed with the engine.
        memory.trim()
        resident_before = memory.resident_bytes()
        close = getattr(runtime.processor, "close", None)
        self._preprocess = self._postprocess = self._sample = None
        try:
            if close is not None:
                close()
        finally:
            del runtime, close
            held_bytes = self.memory_bytes if self.device == "cpu" else math.inf
            memory.release(held_bytes, resident_before)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Who unloads a version only lets go of it: the last pass that is under way keeps it. At the
        # very end the module's names are gone, so that the function is kept here.
        if not is_finalizing():
            self.close()

    @property
    def batch_sizes(self) -> list[int]:
        """The numbers of rows that are warmed up: those declared, or every power of two."""
        declared = self.package.manifest.batching.batch_sizes
        if declared:
            return list(declared)
        return sorted(
            {2**k for k in range(self.max_batch_size.bit_length())} | {self.max_batch_size}
        )

    def warm_up(self, measurements: int = MEASUREMENTS) -> None:
        """Run and measure forward passes of each batch size and declared length.

        Args:
          measurements: how often each is measured, at most, after a first pass; 0: that one counts.
        Raises:
          PackageError: the sample does not fit the signature, or the model fails on it.
        """
        started = time.monotonic()
        try:
            sample = self.prepare(self.sample())
            self._length = self._length_of(sample)
            samples = [sample]
            if self.package.manifest.batching.buckets:
                samples = [
                    self._lengthened(sample, size)
                    for size in self.package.manifest.batching.buckets
                ]
            for member in samples:
                for rows in self.batch_sizes:
                    self.measure(member, rows, started + self.MEASURING_S, measurements)
        except Exception as exc:
            raise PackageError(
                f"{self.package.path}: fails on its warm-up sample: {type(exc).__name__}: {exc}"
            ) from exc
        self._measure_memory()
        logger.info(
            "warmed up %s version %s on %s: batches of %s in %.1f s",
            self.package.name, self.package.version, self.device,
            ", ".join(
                f"{rows} ({self.predict(rows) * 1000:.1f} ms)" for rows in self.batch_sizes
            ),
            time.monotonic() - started,
        )  # fmt: skip

    def measure(self, member: Tensors, rows: int, until: float, most: int = MEASUREMENTS) -> float:
        """Measure forward passes of equal members; the latency curve learns of it.

        Args:
          member: one prepared row.
          rows: of a pass.
          until: the monotonic time after which the measurement is not repeated.
          most: repetitions, at most.
        Returns:
          The median of their seconds.
        """
        took = [self._timed([member] * rows)]
        while len(took) <= most and time.monotonic() < until:
            took.append(self._timed([member] * rows))
        # The first pass also allocates and compiles.
        seconds = median(took[1:] or took)
        self.latency.measured(self.size(rows, self._length_of(member)), seconds)
        return seconds

    def _timed(self, members: list[Tensors]) -> float:
        started = time.perf_counter()
        self._pass(members, Pass())
        return time.perf_counter() - started

    def size(self, rows: int, length: float = 1.0) -> int:
        """Return the size of a forward pass: its rows, padded, times what one holds, padded.

        Args:
          rows: of all members together.
          length: elements of one row of the largest padded tensor; 1 where nothing is padded.
        """
        return round(self._padded_rows(rows) * length)

    def predict(self, rows: int) -> float:
        """Return how many seconds a batch of so many rows will probably take; 0 if unknown."""
        whole, rest = divmod(rows, self.max_batch_size)
        seconds = whole * self.latency.predict(self.size(self.max_batch_size, self._length))
        return seconds + (self.latency.predict(self.size(rest, self._length)) if rest else 0.0)

    def sample(self) -> Tensors:
        """Return inputs of one row."""
        signature = self.package.signature
        given = self.package.manifest.warm_up.inputs
        if given is not None:
            sample = signature.parse(given, _UNBOUNDED)
            return next(chunks(sample, 1)) if signature.batched else sample
        if self._sample is not None:
            return cast(Tensors, self._sample())
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
        prepared = inputs
        if self._preprocess is not None:
            try:
                prepared = cast(Tensors, self._preprocess(inputs))
            except ValueError as exc:
                raise InvalidInput(str(exc), "inputs") from exc
        mask = self.package.manifest.batching.mask
        if not mask:
            return prepared
        # The padding of a mask is 0.
        return prepared | {
            masking: np.ones(prepared[name].shape[:2], np.int64)
            for name, masking in mask.items()
            if name in prepared
        }

    def forward(
        self,
        members: Sequence[Tensors],
        began: Callable[[Sequence[int], Pass], None] = lambda places, took: None,
    ) -> list[Tensors]:
        """Answer prepared members with one forward pass, or several where that takes less time.

        Members of very different lengths are not all padded to the longest: they are grouped so
        that all passes together are predicted to be shortest.

        Args:
          members: what `prepare` returned for each task; together at most `max_batch_size` rows.
          began: told of each pass that begins: which members are in it, by their places, and what
            will say how long it took.
        Returns:
          The declared outputs of each member, in the same order.
        Raises:
          ForwardFailed: the outputs do not match the signature or the number of rows.
          Exception: whatever the model raises.
        """
        answers: dict[int, Tensors] = {}
        started = time.perf_counter()
        for group in self._grouped(members):
            took = Pass()
            began(group, took)
            outputs = self._pass([members[place] for place in group], took)
            answers |= zip(group, outputs, strict=True)
            ended = time.perf_counter()
            rows = sum(count_rows(members[place]) for place in group)
            longest = max(self._length_of(members[place]) for place in group)
            self.latency.note(self.size(rows, longest), ended - started)
            self._length += self.WEIGHT * (longest - self._length)
            started = ended
        return [answers[place] for place in range(len(members))]

    def _pass(self, members: Sequence[Tensors], took: Pass) -> list[Tensors]:
        rows = [count_rows(member) for member in members]
        took.rows = sum(rows) if self.package.signature.batched else 1
        began = time.perf_counter_ns()
        inputs = self._collate(members)
        aside = {name: inputs[name] for name in self._bypass if name in inputs}
        collated = time.perf_counter_ns()
        took.input_ns += collated - began
        try:
            outputs = self._runtime.run({n: a for n, a in inputs.items() if n not in aside})
        finally:
            ran = time.perf_counter_ns()
            took.infer_ns += ran - collated
        answers = self._split(outputs, aside, members, rows)
        took.output_ns += time.perf_counter_ns() - ran
        return answers

    def _split(
        self, outputs: Any, aside: Tensors, members: Sequence[Tensors], rows: Sequence[int]
    ) -> list[Tensors]:
        """Return what a pass gave each of its members, after postprocessing and checks."""
        if self._postprocess is not None:
            outputs = self._postprocess(outputs | aside if aside else outputs)
        if not isinstance(outputs, dict):
            raise ForwardFailed(
                f"the model gave {type(outputs).__name__}, expected outputs by name"
            )
        # Rows that only pad are behind those of the members.
        checked = self._check(outputs, self._padded_rows(sum(rows)))
        if not self.package.signature.batched:
            return [checked]
        ends = np.cumsum(rows).tolist()
        answers = [
            {name: array[end - n : end] for name, array in checked.items()}
            for end, n in zip(ends, rows, strict=True)
        ]
        if self._cut:
            for member, answer in zip(members, answers, strict=True):
                self._cut_padding(member, answer)
        return answers

    def _cut_padding(self, member: Tensors, answer: Tensors) -> None:
        """Cut dimensions that a member's answer shares with its inputs to the inputs' own size."""
        sizes = {
            dim: size
            for spec in self._padded
            if spec.name in member and member[spec.name].ndim == len(spec.shape)
            for dim, size in zip(spec.shape[1:], member[spec.name].shape[1:], strict=True)
        }
        for spec in self._cut:
            if spec.name in answer:
                own = (slice(sizes.get(dim)) for dim in spec.shape[1:])
                answer[spec.name] = answer[spec.name][(slice(None), *own)]

    def _grouped(self, members: Sequence[Tensors]) -> list[list[int]]:
        """Say which members, by their places, shall share a pass."""
        places: dict[int, list[int]] = {}
        for place, member in enumerate(members):
            places.setdefault(self._length_of(member), []).append(place)
        if len(places) == 1:
            return [list(range(len(members)))]
        lengths = sorted(places)
        rows = [sum(count_rows(members[place]) for place in places[n]) for n in lengths]
        # The quickest way to answer the first n lengths, and where its last pass begins.
        quickest, begins = [0.0], [0]
        for end, length in enumerate(lengths, start=1):
            together, best, begin = 0, math.inf, 0
            for first in range(end - 1, -1, -1):
                together += rows[first]
                seconds = quickest[first] + self.latency.predict(self.size(together, length))
                # Of equals, fewer passes.
                if seconds <= best:
                    best, begin = seconds, first
            quickest.append(best)
            begins.append(begin)
        groups: list[list[int]] = []
        end = len(lengths)
        while end:
            groups.append([p for n in lengths[begins[end] : end] for p in places[n]])
            end = begins[end]
        return groups

    def _length_of(self, member: Tensors) -> int:
        batching = self.package.manifest.batching
        return max(
            (
                math.prod(self._padded_shape(name, [member[name]], batching.buckets))
                for name in self._pad
                if name in member
            ),
            default=1,
        )

    def _lengthened(self, member: Tensors, size: int) -> Tensors:
        """Pad what is padded of one member to at least a size."""
        return {name: self._stack(name, [array], (size,)) for name, array in member.items()}

    def _padded_shape(
        self, name: str, arrays: Sequence[Array], sizes: Sequence[int]
    ) -> tuple[int, ...]:
        """Return the dimensions after the rows: the longest of each, free ones up to a size."""
        fixed = self._fixed.get(name, ())
        longest = map(max, zip(*(array.shape[1:] for array in arrays), strict=True))
        return tuple(n if place in fixed else _next(n, sizes) for place, n in enumerate(longest))

    def _stack(self, name: str, arrays: list[Array], sizes: Sequence[int]) -> Array:
        pad = self._pad.get(name)
        if pad is None:
            return np.concatenate(arrays)
        return _pad(arrays, pad, self._padded_shape(name, arrays, sizes))

    def _padded_rows(self, rows: int) -> int:
        return _next(rows, self.package.manifest.batching.batch_sizes)

    def _collate(self, members: Sequence[Tensors]) -> Tensors:
        batching = self.package.manifest.batching
        if len(members) == 1 and not batching.buckets and not batching.batch_sizes:
            return members[0]
        stacked = {
            name: self._stack(name, [member[name] for member in members], batching.buckets)
            for name in members[0]
        }
        rows = count_rows(stacked)
        missing = self._padded_rows(rows) - rows
        if missing > 0:
            # Rows that the model has seen are sure to be valid.
            stacked = {
                n: np.concatenate([a, a[-1:].repeat(missing, axis=0)]) for n, a in stacked.items()
            }
        return stacked

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


def _next(size: int, sizes: Sequence[int]) -> int:
    """Return the smallest listed size that is not below; beyond the last one, the size itself."""
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else size


def _pad(arrays: list[Array], pad: float | str, longest: tuple[int, ...]) -> Array:
    if {array.shape[1:] for array in arrays} == {longest}:
        return np.concatenate(arrays)
    shape, dtype = (sum(map(len, arrays)), *longest), arrays[0].dtype
    # Arrays of text that are not objects are as wide as their longest text.
    dtype = np.dtype(object) if dtype.kind in "US" else dtype
    is_bytes = dtype.hasobject and any(isinstance(a.flat[0], bytes) for a in arrays if a.size)
    out = np.full(shape, str(pad).encode() if is_bytes else pad, dtype=dtype)
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
