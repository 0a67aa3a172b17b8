"""The limit: an engine in plain loops in one process, without a server.

`python -m bench.raw WORKLOAD SECONDS BATCH EXECUTORS THREADS` measures once and prints JSON. Each
loop is an executor, and THREADS is the number of threads of each forward pass. Each configuration
runs in its own process, so that nothing is left of the one before.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from bench.load import latency_ms
from bench.results import Measurement
from bench.workloads import WORKLOADS, Numbers, Workload, texts
from inferno.engine.engine import Engine
from inferno.repository.repository import Repository
from inferno.settings import Settings

TARGET = "raw"
BATCHES = (1, 8, 32)
#: Limit for loading and warming up, in seconds.
START_S = 120


class RawFailed(Exception):
    """An engine could not be measured; the message says why."""


@dataclass(frozen=True)
class Way:
    """A configuration of the loops."""

    batch: int
    executors: int
    #: Threads of each forward pass.
    threads: int

    @property
    def scenario(self) -> str:
        """Name, such as `batches of 32, 1 thread` or `batches of 32, 2 executors`."""
        if self.executors > 1:
            return f"batches of {self.batch}, {self.executors} executors"
        return f"batches of {self.batch}, {self.threads} thread{'' if self.threads == 1 else 's'}"


def ways(workload: Workload) -> list[Way]:
    """Return each batch size with one thread, with several threads, and with several executors."""
    cores = len(os.sched_getaffinity(0))
    # Only models in onnxruntime use threads, and more than one core.
    spread = (
        [(1, 1), (1, cores), (cores, 1)] if workload.model == "embed" and cores > 1 else [(1, 1)]
    )
    return [Way(batch, *use) for use in spread for batch in BATCHES]


def measure(workload: Workload, seconds: float, repeat: int) -> list[Measurement]:
    """Measure every configuration once.

    Raises:
      RawFailed: the model cannot be loaded, or fails.
    """
    return [_one(workload, seconds, way, repeat) for way in ways(workload)]


def _one(workload: Workload, seconds: float, way: Way, repeat: int) -> Measurement:
    command = [sys.executable, "-m", "bench.raw", workload.name, str(seconds)]
    done = subprocess.run(
        [*command, str(way.batch), str(way.executors), str(way.threads)],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + START_S,
    )
    if done.returncode != 0:
        raise RawFailed(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout)
    return Measurement(
        target=TARGET,
        workload=workload.name,
        scenario=way.scenario,
        repeat=repeat,
        seconds=found["seconds"],
        answered=found["answered"],
        latency_ms=found["latency_ms"],
        mean_batch=way.batch,
        cpu_s={"engine": found["cpu_s"]},
        rss_bytes={"engine": found["rss_bytes"]},
    )


def load(workload: Workload, threads: int | None = None) -> Engine:
    """Return the engine of a workload, warmed up.

    Args:
      workload: workload whose model is loaded.
      threads: threads of each forward pass (default: from the settings).
    """
    settings = Settings()
    inference = settings.inference
    if threads is not None:
        inference = inference.model_copy(update={"threads": threads})
    package = Repository.read(settings.repository).model(workload.model).package(workload.version)
    engine = Engine(package, settings.batching, inference)
    engine.warm_up()
    return engine


def answer(engine: Engine, asked: Iterator[str], batch: int) -> None:
    """Answer the next batch of texts, in one or more forward passes."""
    rows = ({"text": np.array([text], object)} for text in islice(asked, batch))
    engine.forward([engine.prepare(row) for row in rows])


def main(name: str, seconds: float, way: Way) -> None:
    """Measure one configuration and print the results as JSON."""
    engine = load(WORKLOADS[name], way.threads)
    numbers = Numbers()
    began, cpu = time.perf_counter(), time.process_time()

    def loop(first: int) -> list[float]:
        """Answer batches of texts, numbered from `first`; return their durations in seconds."""
        asked, took_s = texts(first), []
        while (now := time.perf_counter()) < began + seconds:
            answer(engine, asked, way.batch)
            took_s.append(time.perf_counter() - now)
        return took_s

    with ThreadPoolExecutor(way.executors) as pool:
        loops = list(pool.map(loop, [numbers.first() for _ in range(way.executors)]))
    latencies_s = [took_s for each in loops for took_s in each]
    found = {
        "seconds": time.perf_counter() - began,
        "answered": way.batch * len(latencies_s),
        "latency_ms": latency_ms(latencies_s),
        "cpu_s": time.process_time() - cpu,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Way(*map(int, sys.argv[3:6])))
