"""Checks a package before it serves: load it, run it, compare outputs, and send wrong inputs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from inferno.engine.engine import Engine
from inferno.errors import ForwardFailed, InfernoError, InvalidInput, PackageError, Problem
from inferno.packaging.samples import BadInput, bad_inputs, members
from inferno.protocol.limits import Limits
from inferno.protocol.tensors import Array, Tensors
from inferno.repository.package import Package
from inferno.settings import Settings

#: Allowed difference of outputs by dtype, relative to the largest value; 0 for other dtypes.
TOLERANCES = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-7}
#: Number of different rows to compare.
COMPARED = 8
#: Time to measure the latency of one batch size, in seconds.
MEASURING_S = 0.3


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    state: Literal["ok", "warning", "failure"]
    detail: str


@dataclass(frozen=True)
class Answer:
    """What a client sees after sending a wrong input."""

    case: str
    #: The problem that the client receives; None if the model answers.
    problem: Problem | None
    #: Whether the signature forbids it.
    forbidden: bool


@dataclass
class Report:
    """Results of all checks of a package."""

    path: Path
    package: Package | None = None
    device: str | None = None
    checks: list[Check] = field(default_factory=list)
    #: Median time of a forward pass in ms, by its rows.
    latency_ms: dict[int, float] = field(default_factory=dict)
    #: Growth of the process in bytes, including the runtime's library.
    memory_bytes: int | None = None
    bad_inputs: list[Answer] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.state != "failure" for check in self.checks)

    def document(self) -> dict[str, Any]:
        """Return the report as a JSON document."""
        package = self.package
        return {
            "ok": self.ok,
            "path": str(self.path),
            "model": package and package.name,
            "version": package and package.version,
            "digest": package and package.digest,
            "device": self.device,
            "checks": [asdict(check) for check in self.checks],
            "latency_ms": self.latency_ms,
            "memory_bytes": self.memory_bytes,
            "bad_inputs": [asdict(answer) for answer in self.bad_inputs],
        }

    def add(self, name: str, state: Literal["ok", "warning", "failure"], detail: str) -> None:
        """Add the result of a check."""
        self.checks.append(Check(name, state, detail))


def validate(
    path: Path,
    settings: Settings,
    tolerance: float | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Check the package in a version's folder, in this process.

    Args:
      path: folder of the version.
      settings: settings that the package will be served with.
      tolerance: allowed difference of outputs, relative to the largest value; None for the
        manifest's, else by dtype.
      progress: called with the name of each step.
    """
    report = Report(path)
    try:
        report.package = package = Package.read(path)
        package.check_allowed(allow_code=settings.repository.allow_code)
    except PackageError as exc:
        report.add("manifest", "failure", exc.detail)
        return report
    signature = package.signature
    report.add(
        "manifest",
        "ok",
        f"{len(signature.inputs)} in, {len(signature.outputs)} out, "
        + ("rows share passes" if signature.batched else "each task needs its own pass"),
    )
    if package.is_ensemble:
        report.add("stages", "ok", "an ensemble runs nothing itself; validate its stages' models")
        return report
    if tolerance is None:
        tolerance = package.manifest.batching.tolerance
    _try(report, package, settings, tolerance, progress)
    _check_labels(report, package)
    return report


def _try(
    report: Report,
    package: Package,
    settings: Settings,
    tolerance: float | None,
    progress: Callable[[str], None],
) -> None:
    """Load a package, run it, and add what is found to the report."""
    memory = psutil.Process().memory_info
    progress(step := "load")
    before, started = memory().rss, time.perf_counter()
    try:
        engine = Engine(package, settings.batching, settings.inference)
        report.device = engine.device
        report.add("load", "ok", f"in {time.perf_counter() - started:.2f} s on {engine.device}")
        progress(step := "answer")
        sample = _compare(report, engine, tolerance)
        progress(step := "warm-up")
        _measure(report, engine)
        report.memory_bytes = memory().rss - before + _device_memory()
        progress(step := "bad input")
        _send_wrong_inputs(report, engine, sample, settings)
    except PackageError as exc:
        report.add(step, "failure", exc.detail)


def _device_memory() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0


def _check_labels(report: Report, package: Package) -> None:
    labels = package.manifest.labels
    sizes = {spec.shape[-1] for spec in package.signature.outputs if len(spec.shape) > 1}
    if labels and len(labels) not in sizes:
        report.add(
            "labels",
            "warning",
            f"{len(labels)} labels, but no output has that many scores: {sizes}",
        )


# -- Alone and batched -----------------------------------------------------------------------------


def _compare(report: Report, engine: Engine, tolerance: float | None) -> Tensors:
    """Check that rows do not change each other's outputs; return inputs that work.

    Raises:
      PackageError: the model fails on its own sample.
    """
    usable, alone, error = _run_alone(engine)
    report.add("answer", "ok", "outputs are as declared, without NaN or infinity")
    if not _repeats(report, engine, usable[0], alone[0], tolerance):
        return usable[0]
    if not engine.package.signature.batched or engine.max_batch_size == 1:
        return usable[0]
    if len(usable) == 1:
        reason = f": others fail with {type(error).__name__}: {error}" if error else ""
        report.add(
            "batched",
            "warning",
            f"only the sample could be tried{reason}; add several rows to warm_up.inputs to find "
            "out whether rows change each other's outputs",
        )
    for rows in sorted({min(len(usable), engine.max_batch_size), engine.max_batch_size}):
        _compare_batch(report, engine, usable, alone, rows, tolerance)
    return usable[0]


def _run_alone(engine: Engine) -> tuple[list[Tensors], list[Tensors], Exception | None]:
    """Run different inputs, each alone in its pass.

    Returns:
      The inputs that work, their outputs, and the error of another input, if one failed.

    Raises:
      PackageError: the model fails on its own sample, the first input.
    """
    tried = members(engine, COMPARED)
    usable: list[Tensors] = []
    outputs: list[Tensors] = []
    error: Exception | None = None
    for member in tried:
        try:
            outputs.append(_run(engine, [member])[0])
            usable.append(member)
        except Exception as exc:  # Whatever the model raises.
            if member is tried[0]:
                made_up = engine.package.manifest.warm_up.inputs is None
                raise PackageError(
                    f"fails on its warm-up sample: {type(exc).__name__}: {exc}"
                    + ("; put valid inputs into warm_up.inputs" if made_up else "")
                ) from exc
            error = exc
    return usable, outputs, error


def _repeats(
    report: Report, engine: Engine, inputs: Tensors, outputs: Tensors, tolerance: float | None
) -> bool:
    """Check that the same inputs give the same outputs again."""
    difference = _difference(engine, [outputs], _run(engine, [inputs]))
    if _within(engine, difference, tolerance):
        report.add("repeat", "ok", "the same input gives the same outputs")
        return True
    declared = engine.package.manifest.deterministic
    report.add(
        "repeat",
        "failure" if declared else "warning",
        f"the same input gives different outputs: {_describe(difference)}"
        + ("; the package is declared deterministic" if declared else "")
        + "; so its outputs are not compared between batches",
    )
    return False


def _compare_batch(
    report: Report,
    engine: Engine,
    usable: Sequence[Tensors],
    alone: Sequence[Tensors],
    rows: int,
    tolerance: float | None,
) -> None:
    places = [place % len(usable) for place in range(rows)]
    try:
        together = _run(engine, [usable[place] for place in places])
    except Exception as exc:  # Whatever the model raises.
        report.add(
            "batched", "failure", f"fails on {rows} rows together: {type(exc).__name__}: {exc}"
        )
        return
    expected = [alone[place] for place in places]
    _report_padded_outputs(report, engine, expected, together)
    difference = _difference(engine, expected, together)
    same = _within(engine, difference, tolerance)
    report.add(
        "batched",
        "ok" if same else "failure",
        f"{rows} rows together, {len(set(places))} of them different: "
        + (
            f"as alone, {_describe(difference)}"
            if same
            else f"not as alone, {_describe(difference)}. Rows change each other's outputs; set "
            "batching.tolerance in model.yaml, or --tolerance, to allow more"
        ),
    )


def _report_padded_outputs(
    report: Report, engine: Engine, expected: Sequence[Tensors], together: Sequence[Tensors]
) -> None:
    """Warn about outputs whose shapes change when rows share a batch."""
    longer = [
        spec.name
        for spec in engine.package.signature.outputs
        if any(
            spec.name in one and one[spec.name].shape != other[spec.name].shape
            for one, other in zip(expected, together, strict=True)
        )
    ]
    if longer:
        report.add(
            "padding",
            "warning",
            f"{', '.join(longer)}: longer when longer rows share the batch; values beyond a row's "
            "own length are meaningless",
        )


def _run(engine: Engine, inputs: Sequence[Tensors]) -> list[Tensors]:
    return engine.forward([engine.prepare(dict(member)) for member in inputs])


def _difference(
    engine: Engine, expected: Sequence[Tensors], given: Sequence[Tensors]
) -> dict[str, float]:
    """Return the largest difference of two series of answers by output, relative to the values."""
    return {
        spec.name: max(
            (
                _distance(one[spec.name], other[spec.name])
                for one, other in zip(expected, given, strict=True)
                if spec.name in one
            ),
            default=0.0,
        )
        for spec in engine.package.signature.outputs
    }


def _distance(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        # Padding may lengthen an output; only the common part is compared.
        smaller = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
        one, other = one[smaller], other[smaller]
    if one.dtype.kind != "f":
        return 0.0 if np.array_equal(one, other) else float("inf")
    largest = float(np.abs(one).max(initial=0.0))
    apart = float(np.abs(one.astype(np.float64) - other).max(initial=0.0))
    return apart / largest if largest else apart


def _within(engine: Engine, difference: dict[str, float], tolerance: float | None) -> bool:
    dtypes = {spec.name: spec.dtype for spec in engine.package.signature.outputs}
    return all(
        value <= (TOLERANCES.get(dtypes[name], 0.0) if tolerance is None else tolerance)
        for name, value in difference.items()
    )


def _describe(difference: dict[str, float]) -> str:
    return (
        ", ".join(
            f"{name} differs"
            + ("" if value == float("inf") else f" by {value:.1g} of its largest value")
            for name, value in difference.items()
            if value
        )
        or "to the last bit"
    )


# -- Latency ---------------------------------------------------------------------------------------


def _measure(report: Report, engine: Engine) -> None:
    engine.warm_up()
    sample = engine.prepare(engine.sample())
    for rows in engine.batch_sizes:
        seconds = engine.measure(sample, rows, time.monotonic() + MEASURING_S, 100)
        report.latency_ms[rows] = seconds * 1000
    sizes = ", ".join(map(str, engine.batch_sizes))
    report.add("warm-up", "ok", f"batches of {sizes} rows")


# -- Wrong inputs ----------------------------------------------------------------------------------


def _send_wrong_inputs(report: Report, engine: Engine, good: Tensors, settings: Settings) -> None:
    limits = Limits.of(settings.limits)
    before = _run(engine, [good])[0]
    for bad in bad_inputs(engine.package, good, limits):
        report.bad_inputs.append(_ask(engine, bad, limits))
    asked = report.bad_inputs
    taken = [answer.case for answer in asked if answer.forbidden and answer.problem is None]
    failed = [a for a in asked if a.problem is not None and a.problem["status"] >= 500]
    if taken:
        report.add("bad input", "warning", f"these are accepted: {'; '.join(taken)}")
    if failed:
        report.add(
            "bad input",
            "warning",
            f"these fail with status 500, although the client is at fault: "
            f"{'; '.join(answer.case for answer in failed)}. Raise a ValueError in preprocess to "
            "answer 422",
        )
    if not taken and not failed:
        report.add("bad input", "ok", f"{len(asked)} kinds are refused or answered")
    try:
        same = _within(engine, _difference(engine, [before], _run(engine, [good])), None)
    except Exception as exc:  # Whatever the model raises.
        report.add("afterwards", "failure", f"a valid input fails: {type(exc).__name__}: {exc}")
        return
    random = any(check.name == "repeat" and check.state != "ok" for check in report.checks)
    if not same and not random:
        report.add("afterwards", "failure", "a valid input gives different outputs than before")


def _ask(engine: Engine, bad: BadInput, limits: Limits) -> Answer:
    """Send one wrong input, as the platform does."""
    package = engine.package
    try:
        inputs = package.signature.parse(bad.inputs, limits)
    except InvalidInput as exc:
        return Answer(bad.case, exc.problem(), bad.forbidden)
    try:
        _run(engine, [inputs])
    except InfernoError as exc:
        return Answer(bad.case, exc.problem(), bad.forbidden)
    except Exception as exc:  # Whatever the model raises.
        failed = ForwardFailed(f"{package.name} failed: {type(exc).__name__}: {exc}")
        return Answer(bad.case, failed.problem(), bad.forbidden)
    return Answer(bad.case, None, bad.forbidden)
