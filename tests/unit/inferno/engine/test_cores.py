"""Cores that are kept for forward passes. Each test runs in a thread whose cores are its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from inferno.engine.cores import Cores, idle_s
from inferno.errors import ConfigurationError

HERE = sorted(os.sched_getaffinity(0))
KEPT, OTHERS = {HERE[0]}, set(HERE[1:])

several = pytest.mark.skipif(not OTHERS, reason="needs two cores")


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def where(thread: ThreadPoolExecutor) -> set[int]:
    return thread.submit(os.sched_getaffinity, 0).result()


@several
def test_a_thread_leaves_the_cores_and_takes_them(thread: ThreadPoolExecutor) -> None:
    cores = thread.submit(Cores, KEPT).result()
    assert where(thread) == set(HERE)
    thread.submit(cores.leave)
    assert where(thread) == OTHERS
    thread.submit(cores.take)
    assert where(thread) == KEPT
    thread.submit(cores.leave)
    assert where(thread) == OTHERS


@several
def test_a_child_of_one_that_has_left_them_can_take_them(thread: ThreadPoolExecutor) -> None:
    thread.submit(lambda: Cores(KEPT).leave())
    cores = thread.submit(Cores, KEPT).result()
    thread.submit(cores.take)
    assert where(thread) == KEPT


@several
def test_what_is_started_where_they_are_taken_has_them(thread: ThreadPoolExecutor) -> None:
    def start_another() -> set[int]:
        with Cores(KEPT).taken(), ThreadPoolExecutor(1) as inner:
            return where(inner)

    assert thread.submit(start_another).result() == KEPT
    assert where(thread) == OTHERS


def test_where_none_is_kept_all_run_on_all(thread: ThreadPoolExecutor) -> None:
    cores = Cores(())
    thread.submit(cores.leave)
    thread.submit(cores.take)
    assert where(thread) == set(HERE)


def test_a_core_that_is_not_there_is_named(thread: ThreadPoolExecutor) -> None:
    with pytest.raises(ConfigurationError, match=r"^INFERNO_INFERENCE__CORES: 900, 901: this .*0"):
        thread.submit(Cores, {HERE[0], 900, 901}).result()
    assert where(thread) == set(HERE)


@several
def test_cores_that_are_taken_away_while_it_runs_cost_only_speed(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cores = thread.submit(Cores, KEPT).result()

    def refuse(pid: int, mask: Collection[int]) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setaffinity", refuse)
        cores.take()
        cores.leave()
        with pytest.raises(ConfigurationError, match="this process may not choose its cores"):
            Cores(KEPT)
    assert [record.message for record in caplog.records] == [
        f"cannot run on the cores {HERE[0]} any more: [Errno 22] Invalid argument"
    ]


def test_one_core_is_left_for_everything_else(thread: ThreadPoolExecutor) -> None:
    with pytest.raises(ConfigurationError, match="leave at least one of the cores"):
        thread.submit(Cores, HERE).result()
    assert where(thread) == set(HERE)


class Machine:
    """Two cores and the clocks of a process, as a test sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.own_s, self.idle = 0.0, 0.0, {0: 100.0, 1: 200.0}
        clocks = SimpleNamespace(monotonic=lambda: self.now, process_time=lambda: self.own_s)
        monkeypatch.setattr("inferno.engine.cores.time", clocks)
        monkeypatch.setattr("inferno.engine.cores.idle_s", lambda: dict(self.idle))

    def go_on(self, seconds: float, *, idle_cores: float, own_cores: float) -> None:
        self.now += seconds
        self.own_s += seconds * own_cores
        self.idle[1] += seconds * idle_cores


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("idle_cores", "own_cores", "saturated"),
    [(0.0, 1.5, True), (0.2, 1.1, True), (0.3, 1.5, False), (0.0, 0.9, False)],
)
def test_a_process_that_leaves_hardly_a_core_idle_saturates_them(
    machine: Machine, idle_cores: float, own_cores: float, saturated: bool
) -> None:
    cores = Cores(())
    assert not cores.saturated
    machine.go_on(Cores.LATELY_S, idle_cores=idle_cores, own_cores=own_cores)
    assert cores.saturated is saturated


def test_what_it_was_like_before_does_not_count(machine: Machine) -> None:
    cores = Cores(())
    assert not cores.saturated
    for idle_cores in (2.0, 0.0, 2.0):
        machine.go_on(Cores.LATELY_S, idle_cores=idle_cores, own_cores=2.0 - idle_cores)
        assert cores.saturated is (idle_cores == 0.0)
        # A moment is too short to see how busy cores are
        machine.go_on(Cores.LATELY_S / 2, idle_cores=1.0, own_cores=1.0)
        assert cores.saturated is (idle_cores == 0.0)
        machine.go_on(Cores.LATELY_S / 2, idle_cores=1.0, own_cores=1.0)
        assert not cores.saturated


@pytest.mark.parametrize("idle", [{}, {0: 100.0}, {0: 0.0, 1: 0.0}])
def test_cores_of_which_too_little_is_known_are_not_saturated(
    machine: Machine, idle: dict[int, float]
) -> None:
    cores = Cores(())
    assert not cores.saturated
    machine.go_on(1.0, idle_cores=0.0, own_cores=2.0)
    machine.idle = idle
    assert not cores.saturated


@several
def test_cores_that_are_kept_are_not_saturated(
    machine: Machine, thread: ThreadPoolExecutor
) -> None:
    cores = thread.submit(Cores, KEPT).result()
    for _ in range(2):
        machine.go_on(1.0, idle_cores=0.0, own_cores=2.0)
        assert not cores.saturated


STAT = """\
cpu  400 0 100 3000 300 0 10 0 0 0
cpu{first} 200 0 50 1000 100 0 5 0 0 0
cpu{second} 200 0 50 2000 200 0 5 0 0 0
intr 12345 0 0
ctxt 67890
"""


def test_how_long_each_core_was_idle_is_read_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stat"
    file.write_text(STAT.format(first=4, second=11))
    ticks = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 11})
    assert idle_s(file) == {4: 1100 / ticks, 11: 2200 / ticks}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {11})
    assert idle_s(file) == {11: 2200 / ticks}
    # As in a container that numbers its cores anew
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {11, 12})
    assert idle_s(file) == {}


def test_zeros_say_nothing_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    file = tmp_path / "stat"
    file.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")
    assert idle_s(file) == {}
    assert idle_s(tmp_path / "missing") == {}
