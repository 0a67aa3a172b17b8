"""Cores that are kept for forward passes. Tests change the cores of a thread of their own."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from inferno.engine.cores import Cores
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
