"""Forward step: one loaded version of a model, which loads, warms up and answers batches.

prepare    each member's own preprocessing
forward    group by length -> for each group: collate -> run -> postprocess -> check and split
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import cast

import numpy as np

from inferno.batching.latency import LatencyCurve, Pass
from inferno.engine import memory
from inferno.engine.collation import Collator, chunks, count_rows
from inferno.engine.device import choose_device
from inferno.engine.outputs import OutputSplitter
from inferno.errors import InvalidInput, PackageError
from inferno.protocol.limits import UNLIMITED
from inferno.protocol.signature import BATCH, TensorSpec
from inferno.protocol.tensors import NUMERIC, Array, Tensors
from inferno.repository.package import Package
from inferno.runtimes import ModelContext, Runtime, UnsuitablePrecision, find_runtime
from inferno.settings import BatchingSettings, InferenceSettings

logger = logging.getLogger(__name__)


class Engine:
    """One version, ready for forward passes; thread-safe if its runtime is."""

    #: Most measurements of each batch size during warm-up, after a first pass.
    MEASUREMENTS = 7
    #: Time after which no measurement is repeated, in seconds. Each size is run once in any case.
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
        self.max_batch_size = package.max_batch_size(batching.max_batch_size)
        #: Seconds of a forward pass by its size, see `size`.
        self.latency = LatencyCurve()
        #: Mean length of the longest row of a pass.
        self._length = 1.0
        context = _context(package, package.inference(inference))
        self.device = context.device
        # Libraries stay loaded when an engine goes, so they are imported before memory is measured.
        # The same holds for memory that was freed earlier and would be reused now.
        kind = find_runtime(package)
        memory.trim()
        self._resident_before = memory.resident_bytes()
        self._runtime = self._load(kind, context)
        self._measure_memory()
        processor = self._runtime.processor
        self._preprocess = getattr(processor, "preprocess", None)
        self._postprocess = getattr(processor, "postprocess", None)
        padding: dict[str, float | str] = {}
        #: Prepared tensors that skip the runtime and go to `postprocess`.
        self._bypass: tuple[str, ...] = ()
        self._sample = None
        if self._preprocess is not None:
            padding = getattr(processor, "padding", {})
            self._bypass = getattr(processor, "bypass", ())
            self._sample = getattr(processor, "sample", None)
        self._collator = Collator(package, padding)
        self._outputs = OutputSplitter(package, self._collator.padded)

    def _load(self, kind: type[Runtime], context: ModelContext) -> Runtime:
        try:
            return kind(self.package, context)
        except UnsuitablePrecision as exc:
            # A precision in the settings is a preference; one in the package is a demand.
            if self.package.manifest.inference.quantize is not None:
                raise
            logger.warning("loaded in its own precision: %s", exc)
            return kind(self.package, replace(context, quantize="none"))

    def _measure_memory(self) -> None:
        #: Memory of the engine, in bytes: the size of its weights. On the CPU, the growth of the
        #: process during load and warm-up, if that is more. Includes what other threads allocated
        #: meanwhile; excludes what a pass allocates and frees again.
        self.memory_bytes = self._runtime.memory_bytes
        if self.device == "cpu":
            # Memory that a conversion has freed does not count.
            memory.trim()
            grown = memory.resident_bytes() - self._resident_before
            self.memory_bytes = max(self.memory_bytes, grown)

    def close(self) -> None:
        """Release the engine's memory; no pass may be running, and none can follow.

        Calls the `close` method of the package's own object, if it has one.
        """
        runtime = self.__dict__.pop("_runtime", None)
        if runtime is None:
            return
        # Memory that was freed earlier does not count as freed with the engine.
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
        # Unloading a version only drops the reference, so a running pass keeps the engine. At
        # interpreter exit the module's names are gone, so the function is kept as a default.
        if not is_finalizing():
            self.close()

    @property
    def batch_sizes(self) -> list[int]:
        """Numbers of rows to warm up: the declared ones, or every power of two."""
        declared = self.package.manifest.batching.batch_sizes
        if declared:
            return list(declared)
        return sorted(
            {2**k for k in range(self.max_batch_size.bit_length())} | {self.max_batch_size}
        )

    def warm_up(self, measurements: int = MEASUREMENTS) -> None:
        """Run and measure forward passes of each batch size and declared length.

        Args:
          measurements: most measurements of each, after a first pass. 0: the first pass counts.
        Raises:
          PackageError: the sample does not fit the signature, or the model fails on it.
        """
        started = time.monotonic()
        try:
            sample = self.prepare(self.sample())
            self._length = self._collator.length(sample)
            samples = [sample]
            if self.package.manifest.batching.buckets:
                samples = [
                    self._collator.lengthened(sample, size)
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
        """Measure forward passes of equal members, and add the result to the latency curve.

        Args:
          member: one prepared row.
          rows: rows of a pass.
          until: monotonic time after which the measurement is not repeated.
          most: most repetitions.
        Returns:
          The median, in seconds.
        """
        took = [self._timed([member] * rows)]
        while len(took) <= most and time.monotonic() < until:
            took.append(self._timed([member] * rows))
        # The first pass also allocates and compiles.
        seconds = median(took[1:] or took)
        self.latency.measured(self.size(rows, self._collator.length(member)), seconds)
        return seconds

    def _timed(self, members: list[Tensors]) -> float:
        started = time.perf_counter()
        self._pass(members, Pass())
        return time.perf_counter() - started

    def size(self, rows: int, length: float = 1.0) -> int:
        """Return the size of a forward pass: padded rows times the elements of one padded row.

        Args:
          rows: rows of all members.
          length: elements of one row of the largest padded tensor; 1 where nothing is padded.
        """
        return round(self._collator.padded_rows(rows) * length)

    def predict(self, rows: int) -> float:
        """Return the predicted seconds of a batch of `rows` rows; 0 if unknown."""
        whole, rest = divmod(rows, self.max_batch_size)
        seconds = whole * self.latency.predict(self.size(self.max_batch_size, self._length))
        return seconds + (self.latency.predict(self.size(rest, self._length)) if rest else 0.0)

    def sample(self) -> Tensors:
        """Return warm-up inputs of one row."""
        signature = self.package.signature
        given = self.package.manifest.warm_up.inputs
        if given is not None:
            sample = signature.parse(given, UNLIMITED)
            return next(chunks(sample, 1)) if signature.batched else sample
        if self._sample is not None:
            return cast(Tensors, self._sample())
        required = [spec for spec in signature.inputs if not spec.optional]
        required += map(signature.input, signature.one_of[:1])
        return {spec.name: _made_up(spec) for spec in required or signature.inputs[:1]}

    def prepare(self, inputs: Tensors) -> Tensors:
        """Preprocess the inputs of one task.

        Args:
          inputs: arrays by name, as `Signature.parse` returns them.
        Returns:
          The artifact's inputs, with the task's rows as the first dimension.
        Raises:
          InvalidInput: the model's own code rejects the input with a ValueError.
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
        """Answer prepared members with one forward pass, or with several if that is quicker.

        Args:
          members: prepared inputs of each task; together at most `max_batch_size` rows.
          began: called when a pass begins, with the positions of its members and an object that
            receives its times.
        Returns:
          The declared outputs of each member, in the same order.
        Raises:
          ForwardFailed: the outputs do not match the signature or the number of rows.
          Exception: whatever the model raises.
        """
        answers: dict[int, Tensors] = {}
        started = time.perf_counter()
        for group in self._collator.groups(members, self._predict_pass):
            took = Pass()
            began(group, took)
            outputs = self._pass([members[place] for place in group], took)
            answers |= zip(group, outputs, strict=True)
            ended = time.perf_counter()
            rows = sum(count_rows(members[place]) for place in group)
            longest = max(self._collator.length(members[place]) for place in group)
            self.latency.note(self.size(rows, longest), ended - started)
            self._length += self.WEIGHT * (longest - self._length)
            started = ended
        return [answers[place] for place in range(len(members))]

    def _predict_pass(self, rows: int, length: int) -> float:
        return self.latency.predict(self.size(rows, length))

    def _pass(self, members: Sequence[Tensors], took: Pass) -> list[Tensors]:
        rows = [count_rows(member) for member in members]
        took.rows = sum(rows) if self.package.signature.batched else 1
        began = time.perf_counter_ns()
        inputs = self._collator.collate(members)
        aside = {name: inputs[name] for name in self._bypass if name in inputs}
        collated = time.perf_counter_ns()
        took.input_ns += collated - began
        try:
            outputs = self._runtime.run({n: a for n, a in inputs.items() if n not in aside})
        finally:
            ran = time.perf_counter_ns()
            took.infer_ns += ran - collated
        if self._postprocess is not None:
            outputs = self._postprocess(outputs | aside if aside else outputs)
        padded_rows = self._collator.padded_rows(sum(rows))
        answers = self._outputs.split(outputs, members, rows, padded_rows)
        took.output_ns += time.perf_counter_ns() - ran
        return answers


def _context(package: Package, inference: InferenceSettings) -> ModelContext:
    return ModelContext(
        path=package.path.resolve(),
        device=choose_device(inference.device),
        threads=inference.pass_threads(package.executors),
        parameters=package.manifest.parameters,
        labels=package.manifest.labels,
        quantize=inference.quantize,
        compile=inference.compile,
        onnx_providers=inference.onnx_providers,
    )


def _made_up(spec: TensorSpec) -> Array:
    shape = tuple(dim if isinstance(dim, int) else (1 if dim == BATCH else 8) for dim in spec.shape)
    if spec.dtype in NUMERIC:
        return np.zeros(shape, NUMERIC[spec.dtype])
    array = np.empty(math.prod(shape), dtype=object)
    array[:] = "warm up" if spec.dtype == "string" else b"warm up"
    return array.reshape(shape)
