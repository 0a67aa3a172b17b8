"""Measurements, their medians, and the file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import psutil

from bench import environments
from inferno.errors import ConfigurationError
from inferno.operate.redis_program import find_program

#: Version of the file's format.
SCHEMA = 1
FOLDER = environments.BUILD / "bench-results"


class Place(TypedDict):
    """The identity of a measurement."""

    target: str
    workload: str
    repeat: int


@dataclass(frozen=True)
class Measurement:
    """One target, measured once."""

    target: str
    workload: str
    #: Load, such as `http x64`; the same in all repeats, for all targets.
    scenario: str
    repeat: int
    seconds: float
    answered: int
    #: Texts in one request.
    rows: int = 1
    latency_ms: dict[str, float] = field(default_factory=dict)
    #: Number of errors by kind; measurements with errors are marked wherever they are shown.
    errors: dict[str, int] = field(default_factory=dict)
    #: First error, as text.
    sample: str | None = None
    #: Mean number of requests in a forward pass; None if unknown.
    mean_batch: float | None = None
    #: Answers that are kept results; None outside the cache scenarios.
    cached: int | None = None
    #: Processor time and resident memory, by kind of process.
    cpu_s: dict[str, float] = field(default_factory=dict)
    rss_bytes: dict[str, int] = field(default_factory=dict)
    #: Requests a second of an open loop, and how late the generator was (99th percentile).
    offered_rate: float | None = None
    late_ms: float | None = None
    #: Values that only this scenario has; names carry the unit.
    values: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Failure:
    """A target that could not be measured."""

    target: str
    #: None if the target could not be installed.
    workload: str | None
    reason: str


@dataclass
class Results:
    """The results of one run."""

    machine: dict[str, Any]
    options: dict[str, Any]
    #: Versions of packages by target.
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write everything as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")
        fresh.replace(path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
          ValueError: the file has another schema.
        """
        document = json.loads(path.read_text())
        if document.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} was written by another version: expected schema {SCHEMA}")
        document["measurements"] = [Measurement(**m) for m in document["measurements"]]
        document["failures"] = [Failure(**f) for f in document["failures"]]
        return cls(**document)


@dataclass(frozen=True)
class Summary:
    """The repeats of one target in one scenario, as medians."""

    target: str
    workload: str
    scenario: str
    repeats: int
    #: Answers a second: the median, and the lowest and highest repeat.
    rate: float
    rate_range: tuple[float, float]
    rows: int
    latency_ms: dict[str, float]
    #: Number of errors in all repeats.
    errors: int
    sample: str | None
    mean_batch: float | None
    #: Share of answers that are kept results.
    cached: float | None
    #: Processor seconds for 1,000 answers, by kind of process.
    cpu_s_per_1000: dict[str, float]
    rss_bytes: dict[str, float]
    offered_rate: float | None
    late_ms: float | None
    values: dict[str, float]


def summarise(measurements: Iterable[Measurement]) -> list[Summary]:
    """Return the medians of the repeats, in the order of their first measurements."""
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.workload, m.scenario, m.target), []).append(m)
    return [_summary(group) for group in groups.values()]


def _summary(group: Sequence[Measurement]) -> Summary:
    first = group[0]
    rates = [m.rate for m in group]
    cpu = [
        {kind: s / m.answered * 1000 for kind, s in m.cpu_s.items()} if m.answered else {}
        for m in group
    ]
    return Summary(
        target=first.target,
        workload=first.workload,
        scenario=first.scenario,
        repeats=len(group),
        rate=statistics.median(rates),
        rate_range=(min(rates), max(rates)),
        rows=first.rows,
        latency_ms=_medians([m.latency_ms for m in group]),
        errors=sum(sum(m.errors.values()) for m in group),
        sample=next((m.sample for m in group if m.sample), None),
        mean_batch=_median([m.mean_batch for m in group]),
        cached=_median(
            [m.cached / m.answered if m.cached is not None and m.answered else None for m in group]
        ),
        cpu_s_per_1000=_medians(cpu),
        rss_bytes=_medians([m.rss_bytes for m in group]),
        offered_rate=first.offered_rate,
        late_ms=_median([m.late_ms for m in group]),
        values=_medians([m.values for m in group]),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _medians(documents: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for document in documents for name in document)
    return {name: statistics.median([d[name] for d in documents if name in d]) for name in names}


def machine() -> dict[str, Any]:
    """Describe this machine and the measured commit."""
    try:
        redis = str(find_program())
    except ConfigurationError as exc:
        redis = str(exc)
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "redis": redis,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=environments.ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def new_path() -> Path:
    """Return the file for the results of a run that starts now."""
    at = datetime.now().strftime("%Y%m%d-%H%M%S")
    return FOLDER / f"{at}-{_git('rev-parse', '--short', 'HEAD') or 'unknown'}.json"
