"""The limit: an engine in a plain loop in one process, with no server around it.

`python -m bench.raw WORKLOAD SECONDS BATCH THREADS` measures once and prints JSON; each size runs
in a process of its own, so that nothing is left of the one before.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from itertools import islice

import numpy as np

from bench.load import latency_ms
from bench.results import Measurement
from bench.workloads import WORKLOADS, Numbers, Workload, texts
from inferno.engine import Engine
from inferno.repository import Repository
from inferno.settings import Settings

TARGET = "raw"
BATCHES = (1, 8, 32)
#: Most that loading and warming up may take, in seconds.
START_S = 120


class RawFailed(Exception):
    """An engine could not be measured; says why."""


def measure(workload: Workload, seconds: float) -> list[Measurement]:
    """Measure each batch size, with one thread and with one for each core.

    Raises:
      RawFailed: the model cannot be loaded, or fails.
    """
    cores = len(os.sched_getaffinity(0))
    # Only what runs on onnxruntime uses threads.
    threads = sorted({1, cores}) if workload.model == "embed" else [1]
    return [_one(workload, seconds, batch, n) for n in threads for batch in BATCHES]


def _one(workload: Workload, seconds: float, batch: int, threads: int) -> Measurement:
    command = [sys.executable, "-m", "bench.raw", workload.name, str(seconds)]
    done = subprocess.run(
        [*command, str(batch), str(threads)],
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
        scenario=f"batches of {batch}, {threads} thread{'' if threads == 1 else 's'}",
        repeat=1,
        seconds=found["seconds"],
        answered=found["answered"],
        latency_ms=found["latency_ms"],
        mean_batch=batch,
        cpu_s={"engine": found["cpu_s"]},
        rss_bytes={"engine": found["rss_bytes"]},
    )


def main(name: str, seconds: float, batch: int, threads: int) -> None:
    """Measure one size and print what was found."""
    workload = WORKLOADS[name]
    settings = Settings()
    inference = settings.inference.model_copy(update={"threads": threads})
    package = Repository.read(settings.repository).model(workload.model).package(workload.version)
    engine = Engine(package, settings.batching, inference)
    engine.warm_up()
    asked = texts(Numbers.RANGE)
    latencies_s = []
    began, cpu = time.perf_counter(), time.process_time()
    end = began + seconds
    while (now := time.perf_counter()) < end:
        rows = ({"text": np.array([text], object)} for text in islice(asked, batch))
        engine.forward([engine.prepare(row) for row in rows])
        latencies_s.append(time.perf_counter() - now)
    found = {
        "seconds": time.perf_counter() - began,
        "answered": batch * len(latencies_s),
        "latency_ms": latency_ms(latencies_s),
        "cpu_s": time.process_time() - cpu,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
