"""Finds a model's settings: measures its forward passes, and simulates its lane with them.

tune       engine -> seconds by rows, for each number of executors -> the best settings
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
from inferno.repository.package import Package
from inferno.settings import BatchingSettings, InferenceSettings

#: Time in seconds that an executor needs to begin and settle a batch, measured on the platform.
OVERHEAD_S = 0.0015
#: Number of simulated tasks.
TASKS = 4000
#: Time in seconds that the front end needs for one task.
FRONT_END_S = 0.0002


class Measured(msgspec.Struct, frozen=True):
    """Measured times of a model's forward passes."""

    model: str
    version: int
    device: str
    #: Number of concurrent passes.
    executors: int
    #: Threads of each pass.
    threads: int
    #: Median time of a pass in seconds, by its rows.
    seconds: dict[int, float]

    def rows_per_s(self, rows: int) -> float:
        """Return the throughput of passes with this many rows, in rows per second."""
        return self.executors * rows / self.seconds[rows]

    @property
    def best(self) -> int:
        """Rows of the pass with the highest throughput; within 2 %, the fewest rows."""
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
    """Measure the forward passes of a model while all executors are busy.

    Args:
      package: package of the model; its warm-up sample is measured.
      batching: settings of batches.
      inference: settings of engines; `threads` replaces theirs.
      executors: number of concurrent passes.
      threads: threads of each pass.
      seconds: time to measure each batch size.
      progress: called with a description of each step.
    Raises:
      PackageError: the model cannot be loaded, or fails on its sample.
    """
    section = package.manifest.inference.model_copy(update={"threads": threads})
    manifest = package.manifest.model_copy(update={"inference": section})
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
    """Return the highest throughput; within 5 %, the one with most threads for a single task."""
    most = max(m.rows_per_s(m.best) for m in measured)
    return max(
        (m for m in measured if m.rows_per_s(m.best) >= 0.95 * most), key=lambda m: m.threads
    )


def candidates(cores: int | None = None) -> list[tuple[int, int]]:
    """Return pairs of executors and threads per executor that use all cores."""
    cores = cores or len(os.sched_getaffinity(0))
    executors = sorted({1, min(2, cores), cores})
    return [(number, cores // number) for number in executors]


@dataclass(frozen=True)
class Choice:
    """Settings of a model, and its simulated behaviour with them."""

    max_batch_size: int
    max_batch_delay_ms: float
    report: Report

    @property
    def p95_ms(self) -> float:
        """95th percentile of the time from a client's call to its answer, in milliseconds."""
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
      measured: times of the model's passes.
      arrivals: time of each call in seconds, and the client that calls.
      until: end of the simulation, in seconds.
      max_batch_size: maximum number of rows in one pass; each task has one row.
      max_batch_delay_ms: the window, in ms.
      closed_loop: whether clients call again after each answer.
      adaptive: whether the window ends early when no other task is expected.
      overhead: time of a batch besides its pass, in seconds.
      slo_p95_ms: latency objective of the model, in ms.
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


#: Windows to simulate, in ms.
DELAYS_MS = (0.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def choices(measured: Measured, *, rate: float | None) -> Iterator[Choice]:
    """Simulate every measured batch size with every window of `DELAYS_MS`.

    Args:
      measured: times of the model's passes.
      rate: independent tasks per second; None for clients that keep the model busy.
    """
    clients = 2 * max(measured.seconds) * measured.executors
    longest = OVERHEAD_S + max(measured.seconds.values())
    # Long enough for the tail of the latencies.
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
    """Return the best choice, or None if no choice meets the objective.

    Of the choices that meet the objective and keep up with the arrivals, the best has the highest
    throughput (within 2 %), then the lowest latency, then the shortest window.
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
