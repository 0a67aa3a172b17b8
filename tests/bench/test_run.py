"""One small run of the real thing: Inferno and the inline Flask, measured and compared."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from bench.results import Measurement, Results
from inferno.testing.processes import process

HAS_WRK = shutil.which("wrk") is not None
needs_wrk = pytest.mark.skipif(not HAS_WRK, reason="wrk is not installed: apt-get install wrk")


def bench(*arguments: str, folder: Path) -> str:
    """Run the command line; returns what it printed."""
    log = folder / f"{arguments[0]}.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", *arguments]
    # One that takes too long is told to end, and then ends what it has started.
    with process(command, {"TMPDIR": str(folder)}, log) as popen:
        popen.wait(timeout=100)
    assert popen.returncode == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What a run prints; its results are in `run.json`."""
    # One text in a request is wrk's; an open loop needs to know what wrk found.
    rows, loops = ("1,2", ["--open"]) if HAS_WRK else ("2", [])
    options = ["--connections", "4", "--seconds", "1", "--warm-up", "0", "--repeats", "1"]
    more = ["--ways", "http,websocket,poll", "--rows", rows, "--backlogs", "50", "--sockets", "5"]
    more += ["--idle-s", "1"]
    targets = ["--targets", "inferno,flask,raw", "--workloads", "echo"]
    place = ["--output", str(folder / "run.json")]
    return bench("run", *targets, *options, *more, *loops, *place, folder=folder)


@pytest.fixture
def measurements(output: str, folder: Path) -> list[Measurement]:
    results = Results.read(folder / "run.json")
    assert results.failures == []
    return results.measurements


def scenarios(measurements: Sequence[Measurement], target: str) -> set[str]:
    return {m.scenario for m in measurements if m.target == target}


def test_every_scenario_is_measured_without_errors(measurements):
    own = {"http x2, 2 rows", "websocket x2, 2 rows", "poll x2, 2 rows"}
    assert scenarios(measurements, "inferno") >= own | {"drain of 50 waiting", "5 idle sockets"}
    assert "http x2, 2 rows" in scenarios(measurements, "flask")
    assert not scenarios(measurements, "flask") & {"websocket x2, 2 rows", "poll x2, 2 rows"}
    assert len(scenarios(measurements, "raw")) == 3
    assert [m for m in measurements if m.errors] == []
    assert [m for m in measurements if not m.answered and "sockets" not in m.scenario] == []


@needs_wrk
def test_closed_and_open_loops_over_http_are_measured_for_both(measurements):
    for target in ("inferno", "flask"):
        assert scenarios(measurements, target) >= {"http x4", "http open, 70%"}
        (closed,) = [m for m in measurements if (m.target, m.scenario) == (target, "http x4")]
        assert set(closed.latency_ms) == {"p50", "p90", "p95", "p99", "max"}
        assert closed.latency_ms["p50"] <= closed.latency_ms["max"]
        (opened,) = [m for m in measurements if m.target == target and m.offered_rate]
        assert opened.offered_rate == pytest.approx(0.7 * closed.rate)


def test_processor_time_and_memory_are_known_by_kind_of_process(measurements):
    for m in measurements:
        kinds = {"raw": {"engine"}, "flask": {"web"}}.get(m.target, {"web", "worker", "redis"})
        assert set(m.rss_bytes) >= kinds
        assert min(m.rss_bytes.values()) > 2**20
        assert set(m.cpu_s) >= kinds


def test_the_size_of_batches_is_known(measurements):
    for m in measurements:
        if m.rows == 2 and m.target != "raw":
            assert m.mean_batch is not None
            assert 1 <= m.mean_batch <= 4


def test_no_process_is_left(measurements, output, folder):
    assert "killed a process" not in output

    def belongs(process: psutil.Process) -> bool:
        try:
            return process.pid != psutil.Process().pid and any(
                str(folder) in value for value in process.environ().values()
            )
        except psutil.Error:
            return False

    assert [process.cmdline() for process in psutil.process_iter() if belongs(process)] == []


def test_results_are_shown_and_compared(output, folder):
    file = str(folder / "run.json")
    assert bench("show", file, folder=folder).strip() in output
    compared = bench("compare", file, file, folder=folder)
    assert "poll x2, 2 rows" in compared
    assert "1.00" in compared
