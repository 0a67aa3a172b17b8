"""How many calls a machine could answer beside its engine's passes, and how many Inferno answers.

Each turn has three measurements, in processes of its own:

    alone      the engine in plain loops, as many as its model has executors
    beside     the same loops while Inferno answers calls in full batches, with passes that last as
               long as the engine's but cost nothing: what the loops lose is the cost of the calls
    answered   the calls that Inferno answers with the engine

Measured this way, the cost of a call includes all effects of sharing cores: cold caches,
interruptions, and the kernel's own time. The processor time of lone calls does not include them.

`python -m bench.remainder WORKLOAD` runs the loops until it is terminated. It prints a line when it
is ready, and then the end time of each batch, by the monotonic clock.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO

import msgspec
import yaml

from bench import environments, raw, wrk
from bench.load import Load
from bench.targets import Broken, Inferno
from bench.workloads import WORKLOADS, Numbers, Workload, texts
from inferno.repository.manifest import MANIFEST
from inferno.repository.repository import Package, Repository
from inferno.settings import Settings

#: How long servers and loops run before they are measured, in seconds.
WARM_UP_S = 2
#: Texts in a batch of the loops.
BATCH = 32
#: What the loops print when they begin.
READY = "ready\n"

#: Code of a model whose passes only wait, and return embeddings that were drawn before.
_WAITS = """\
import time

import numpy as np


class Waits:
    def __init__(self, parameters):
        self._pass_s, self._output = parameters["pass_s"], parameters["output"]
        kept = np.random.default_rng(0).standard_normal((1024, parameters["size"]))
        self._kept = (kept / np.linalg.norm(kept, axis=1, keepdims=True)).astype(np.float32)

    def __call__(self, inputs):
        [texts] = inputs.values()
        time.sleep(self._pass_s)
        return {self._output: self._kept[: len(texts)]}


def build(context):
    return Waits(context.parameters)
"""


class Turn(msgspec.Struct, frozen=True):
    """The rates of one turn, in texts a second."""

    #: Rate of the loops alone.
    alone: float
    #: Rate of the loops beside `calls` a second whose passes cost nothing.
    beside: float
    calls: float
    #: Rate of Inferno with the engine.
    answered: float
    #: Latency of the calls of `answered`, 99th percentile.
    p99_ms: float
    #: Mean batch of `calls` and of `answered`.
    batch_beside: float
    batch: float

    @property
    def cost(self) -> float:
        """Share of the machine that one call a second takes, without its pass."""
        return (1 - self.beside / self.alone) / self.calls

    @property
    def left(self) -> float:
        """Calls a second that take the whole machine, with their passes.

        This assumes that the loops alone fill the machine, and that a call costs the same at any
        rate.
        """
        return 1 / (1 / self.alone + self.cost)


class LoopsFailed(Exception):
    """The engine does not run; the message says why."""


def measure(
    workload: Workload,
    connections: int,
    seconds: int,
    turns: int,
    env: Mapping[str, str],
    say: Callable[[str], None],
) -> list[Turn]:
    """Measure in turns.

    Args:
      workload: a workload whose model has one output, float32 [batch, size].
      connections: connections, each with one call under way.
      seconds: length of each measurement.
      turns: number of turns.
      env: settings of Inferno that differ from the defaults.
      say: called with the results of each turn, as text.
    Raises:
      LoopsFailed: the engine does not run.
      Broken: Inferno does not start, or a call fails.
      WrkFailed: wrk printed no result.
      InfernoError: the settings or the model's package are wrong.
    """
    package = Repository.read(Settings().repository).model(workload.model).package(workload.version)
    numbers = Numbers()

    def ask(more: Mapping[str, str]) -> tuple[float, Load]:
        """Return the start of the measurement, by the monotonic clock, and its load."""
        with (
            tempfile.TemporaryDirectory(prefix="bench-inferno-") as folder,
            Inferno(env={**env, **more}).serve(workload, Path(folder)) as service,
        ):
            wrk.run(service, connections=connections, seconds=WARM_UP_S, first=numbers.first())
            began = time.monotonic()
            load = wrk.run(service, connections=connections, seconds=seconds, first=numbers.first())
        if load.errors or not load.answered:
            raise Broken(f"calls failed: {load.errors}, such as: {load.sample}")
        return began, load

    def measure_beside() -> tuple[float, float, Load]:
        """Return the rates of the loops alone and beside calls, and the load of the calls."""
        with (
            running(workload, env) as loops,
            tempfile.TemporaryDirectory(prefix="bench-models-") as models,
        ):
            time.sleep(WARM_UP_S + seconds)
            alone = loops.rate(time.monotonic() - seconds, seconds)
            _write_waiting(package, package.executors * BATCH / alone, Path(models))
            # The fixed window fills the batches, so calls cost as little as possible.
            fixed = {"INFERNO_BATCHING__ADAPTIVE": "false"}
            began, calls = ask({"INFERNO_REPOSITORY__ROOT": models, **fixed})
            # Leave out the time while wrk starts, and after it has ended.
            return alone, loops.rate(began + 0.1 * seconds, 0.9 * seconds), calls

    found = []
    for number in range(1, turns + 1):
        # The machine may become faster or slower, so the order alternates.
        if number % 2:
            (alone, beside, calls), (_, load) = measure_beside(), ask({})
        else:
            (_, load), (alone, beside, calls) = ask({}), measure_beside()
        turn = Turn(
            alone=alone,
            beside=beside,
            calls=calls.answered / calls.seconds,
            answered=load.answered / load.seconds,
            p99_ms=load.latency_ms["p99"],
            batch_beside=calls.mean_batch or 1.0,
            batch=load.mean_batch or 1.0,
        )
        say(
            f"turn {number}: the loops make {alone:,.0f}/s, and {beside:,.0f} beside "
            f"{turn.calls:,.0f} calls; Inferno answers {turn.answered:,.0f} of {turn.left:,.0f}"
        )
        found.append(turn)
    return found


class Loops:
    """The loops, in their own process."""

    def __init__(self, popen: subprocess.Popen[str], errors: IO[str]) -> None:
        """Store the process.

        Args:
          popen: process, with a pipe for stdout.
          errors: file with its stderr.
        """
        assert popen.stdout is not None
        self._popen, self._lines, self._errors = popen, popen.stdout, errors
        self._reader = Thread(target=self._read)
        self._ended: list[float] = []

    def start(self) -> None:
        """Wait until the engine is loaded.

        Raises:
          LoopsFailed: it cannot be loaded.
        """
        if READY not in self._lines:
            raise self._failed()
        self._reader.start()

    def _read(self) -> None:
        for line in self._lines:
            self._ended.append(float(line))

    def rate(self, began: float, seconds: float) -> float:
        """Return the texts a second that the loops answered in a past interval.

        Args:
          began: start of the interval, by the monotonic clock.
          seconds: length of the interval, which is over.
        Raises:
          LoopsFailed: the loops have ended, or finished fewer than two batches in the interval.
        """
        if self._popen.poll() is not None:
            raise self._failed()
        ended = [at for at in self._ended if began <= at < began + seconds]
        if len(ended) < 2:
            raise LoopsFailed(
                f"the loops finished {len(ended)} batches in {seconds:g} s, expected at least 2"
            )
        return BATCH * (len(ended) - 1) / (ended[-1] - ended[0])

    def _failed(self) -> LoopsFailed:
        self._popen.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return LoopsFailed(f"the loops ended: {lines[-1] if lines else 'without a message'}")

    def stop(self) -> None:
        """Terminate the process."""
        self._popen.terminate()
        self._popen.wait()
        if self._reader.ident is not None:
            self._reader.join()


@contextmanager
def running(workload: Workload, env: Mapping[str, str]) -> Iterator[Loops]:
    """Run the loops until the block ends.

    Raises:
      LoopsFailed: the engine cannot be loaded.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "bench.remainder", workload.name],
            cwd=environments.ROOT,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as popen,
    ):
        loops = Loops(popen, errors)
        try:
            loops.start()
            yield loops
        finally:
            loops.stop()


def _write_waiting(package: Package, pass_s: float, root: Path) -> None:
    """Write a package with the signature of another one, whose passes only wait."""
    folder = root / package.name / str(package.version)
    folder.mkdir(parents=True)
    [output] = package.signature.outputs
    manifest = yaml.safe_load((package.path / MANIFEST).read_text())
    for name in ("artifact", "processor"):
        manifest.pop(name, None)
    for name in ("pad", "tolerance"):
        manifest["batching"].pop(name, None)
    manifest |= {
        "format": "python",
        "entrypoint": "model:build",
        "parameters": {"pass_s": pass_s, "output": output.name, "size": output.shape[1]},
    }
    (folder / MANIFEST).write_text(yaml.safe_dump(manifest))
    (folder / "model.py").write_text(_WAITS)


def lines(turns: Sequence[Turn]) -> Iterator[str]:
    """Describe the results: means of the turns, with their standard errors."""
    cores = len(os.sched_getaffinity(0))

    def mean(values: Sequence[float], digits: int = 0) -> str:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{statistics.fmean(values):,.{digits}f} ({error:,.{digits}f})"

    yield f"Loops of the engine alone: {mean([turn.alone for turn in turns])} texts a second."
    yield (
        f"Beside {mean([turn.calls for turn in turns])} calls whose passes cost nothing, "
        f"in batches of {mean([turn.batch_beside for turn in turns], 1)}: "
        f"{mean([turn.beside for turn in turns])}."
    )
    cost = mean([1000 * cores * turn.cost for turn in turns], 3)
    yield f"So a call costs {cost} ms of a core besides its pass, which leaves"
    yield f"{mean([turn.left for turn in turns])} calls a second."
    yield (
        f"Inferno answers {mean([turn.answered for turn in turns])}, in batches of "
        f"{mean([turn.batch for turn in turns], 1)}: "
        f"{mean([turn.answered / turn.left for turn in turns], 3)} of that, "
        f"p99 {mean([turn.p99_ms for turn in turns])} ms."
    )


def main(name: str) -> None:
    """Run the loops until this process is terminated."""
    engine = raw.load(WORKLOADS[name])
    numbers = Numbers()

    def loop(first: int) -> None:
        asked = texts(first)
        try:
            while True:
                raw.answer(engine, asked, BATCH)
                # One write for each line, so that lines of several threads do not mix.
                os.write(sys.stdout.fileno(), b"%f\n" % time.monotonic())
        except BaseException:
            # Fewer loops would measure something else.
            traceback.print_exc()
            os._exit(1)

    print(READY, end="", flush=True)
    for _ in range(engine.package.executors):
        Thread(target=loop, args=[numbers.first()]).start()


if __name__ == "__main__":
    main(sys.argv[1])
