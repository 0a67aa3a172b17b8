"""Choosing a model's settings: measure its forward passes here, and simulate its lane with them.

tune       engine -> seconds by rows, for each number of executors -> the settings that do best
simulate   seconds by rows, arrivals, settings -> throughput and latencies
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

import msgspec

from inferno.batching.former import BatchFormer
from inferno.batching.latency import LatencyCurve
from inferno.batching.simulation import Call, Report, Simulation, crowd, poisson
from inferno.engine.engine import Engine
from inferno.repository.repository import Package
from inferno.settings import BatchingSettings, InferenceSettings

#: Beginning and settling a batch, which its executor does too: measured on the platform, in
#: seconds.
OVERHEAD_S = 0.0015
#: So many tasks are simulated.
TASKS = 4000
#: What the front end takes for one task, in seconds.
FRONT_END_S = 0.0002


class Measured(msgspec.Struct, frozen=True):
    """How long the passes of a model take, with so many at the same time."""

    model: str
    version: int
    device: str
    #: Passes at the same time, each with so many threads.
    executors: int
    threads: int
    #: Median of a pass by its rows.
    seconds: dict[int, float]

    def rows_per_s(self, rows: int) -> float:
        """Return what passes of so many rows get done."""
        return self.executors * rows / self.seconds[rows]

    @property
    def best(self) -> int:
        """The rows of the pass that gets most done; the smallest within 2 %: it answers sooner."""
        most = max(map(self.rows_per_s, self.seconds))
        return min(rows for rows in self.seconds if self.rows_per_s(rows) >= 0.98 * most)


def measure(
    package: Package,
    batching: BatchingSettings,
    inference: InferenceSettings,
    executors: int,
    threads: int,
    seconds: float,
    progress: Callable[[str], None],
) -> Measured:
    """Measure the passes of a model with so many executors, all of them busy.

    Args:
      package: with the warm-up sample that is measured.
      batching: the settings of batches.
      inference: the settings of engines, but for the threads.
      executors: passes at the same time.
      threads: of each.
      seconds: to spend on each batch size.
      progress: is told what is being measured.
    Raises:
      PackageError: it cannot be loaded, or fails on its sample.
    """
    said = package.manifest.inference.model_copy(update={"threads": threads})
    manifest = package.manifest.model_copy(update={"inference": said})
    engine = Engine(replace(package, manifest=manifest), batching, inference)
    progress(f"warming up, {executors} x {threads} threads")
    engine.warm_up()
    sample = engine.prepare(engine.sample())
    found: dict[int, float] = {}
    with ThreadPoolExecutor(executors) as pool:
        for rows in engine.batch_sizes:
            progress(f"{rows} rows, {executors} x {threads} threads")
            until = time.monotonic() + seconds
            running = [
                pool.submit(engine.measure, sample, rows, until, 1000) for _ in range(executors)
            ]
            found[rows] = sum(pass_.result() for pass_ in running) / executors
    return Measured(package.name, package.version, engine.device, executors, threads, found)


def quickest(measured: Sequence[Measured]) -> Measured:
    """Return what gets most done; within 5 %, the one that has most threads for a lone task."""
    most = max(m.rows_per_s(m.best) for m in measured)
    return max(
        (m for m in measured if m.rows_per_s(m.best) >= 0.95 * most), key=lambda m: m.threads
    )


def candidates(cores: int | None = None) -> list[tuple[int, int]]:
    """Return the numbers of executors and of threads for each that share this machine's cores."""
    cores = cores or len(os.sched_getaffinity(0))
    executors = sorted({1, min(2, cores), cores})
    return [(number, cores // number) for number in executors]


@dataclass(frozen=True)
class Choice:
    """Settings of a model, and how it behaves with them."""

    max_batch_size: int
    max_batch_delay_ms: float
    report: Report

    @property
    def p95_ms(self) -> float:
        """The 95th percentile from a client's call to its answer."""
        return self.report.percentile(95) * 1000


def simulate(
    measured: Measured,
    arrivals: Iterable[tuple[float, int]],
    *,
    until: float,
    max_batch_size: int,
    max_batch_delay_ms: float,
    closed_loop: bool,
    adaptive: bool = True,
    overhead: float = OVERHEAD_S,
    slo_p95_ms: float | None = None,
) -> Choice:
    """Simulate a model's lane.

    Args:
      measured: how long its passes take.
      arrivals: when which client calls, in seconds.
      until: when the simulation ends, in seconds.
      max_batch_size: rows of one pass, at most; each task has one.
      max_batch_delay_ms: the window.
      closed_loop: whether clients call again after an answer.
      adaptive: end the window early when nobody else is expected.
      overhead: of a batch, beside its pass, in seconds.
      slo_p95_ms: the objective of the model.
    """
    curve = LatencyCurve(measured.seconds)
    former: BatchFormer[Call] = BatchFormer(
        max_batch_size,
        max_batch_delay_ms / 1000,
        adaptive,
        lambda key, rows: curve.predict(rows),
        None if slo_p95_ms is None else slo_p95_ms / 1000,
    )
    simulation = Simulation(
        former,
        busy=lambda rows: overhead + curve.predict(rows),
        executors=measured.executors,
        front_end=FRONT_END_S,
        closed_loop=closed_loop,
    )
    for at, client in arrivals:
        simulation.call(at, client)
    return Choice(max_batch_size, max_batch_delay_ms, simulation.run(until))


#: The windows that are tried, in ms.
DELAYS_MS = (0.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def choices(measured: Measured, *, rate: float | None) -> Iterator[Choice]:
    """Simulate every measured batch size with every window of `DELAYS_MS`.

    Args:
      measured: how long passes take.
      rate: tasks of strangers in a second; None for a crowd of clients that keeps the model busy.
    """
    clients = 2 * max(measured.seconds) * measured.executors
    longest = OVERHEAD_S + max(measured.seconds.values())
    # Enough for the tail of the latencies, and no more.
    until = max(min(20.0, TASKS / rate) if rate else TASKS * longest / clients, 30 * longest)
    for size, delay_ms in product(measured.seconds, DELAYS_MS):
        yield simulate(
            measured,
            poisson(rate, until) if rate else crowd(clients, spacing=FRONT_END_S),
            until=until,
            max_batch_size=size,
            max_batch_delay_ms=delay_ms,
            closed_loop=rate is None,
        )


def recommend(
    choices: Sequence[Choice], *, slo_p95_ms: float | None, rate: float | None
) -> Choice | None:
    """Return the best choice, or None when none meets the objective.

    It keeps the objective and keeps up with the arrivals; of those, it gets most done (within 2 %),
    then answers soonest, then is the one with the shortest window.
    """
    fitting = [
        choice
        for choice in choices
        if (slo_p95_ms is None or choice.p95_ms <= slo_p95_ms)
        and (rate is None or choice.report.tasks_per_s >= 0.95 * rate)
    ]
    if not fitting:
        return None
    most = max(choice.report.tasks_per_s for choice in fitting)
    quick = [choice for choice in fitting if choice.report.tasks_per_s >= 0.98 * most]
    return min(quick, key=lambda choice: (round(choice.p95_ms, 1), choice.max_batch_delay_ms))
