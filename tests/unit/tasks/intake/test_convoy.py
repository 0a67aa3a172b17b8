"""Concurrent calls share round trips, and each gets its own answer."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from inferno.testing.processes import wait_until as until
from tasks.intake.convoy import Convoy


class Line:
    """Runs convoys when it is told to, and notes what was in each."""

    def __init__(self) -> None:
        self.convoys: list[list[int]] = []
        self.started = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def run(self, items: list[int]) -> list[int]:
        self.convoys.append(items)
        self.started.release()
        assert self.go_on.acquire(timeout=10)
        if -1 in items:
            raise ValueError("one too few")
        return [2 * item for item in items]


@pytest.fixture
def line() -> Line:
    return Line()


def test_calls_that_come_meanwhile_leave_together(line):
    convoy = Convoy(line.run)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(convoy.call, 1)
        assert line.started.acquire(timeout=10)
        others = [pool.submit(convoy.call, n) for n in range(2, 8)]
        until(lambda: len(convoy._waiting) == 6)
        line.go_on.release(2)
        assert first.result(10) == 2
        assert [other.result(10) for other in others] == [2 * n for n in range(2, 8)]
    assert [len(items) for items in line.convoys] == [1, 6]


def test_a_convoy_has_only_so_many_places(line):
    convoy = Convoy(line.run)
    convoy.MOST = 4
    with ThreadPoolExecutor(11) as pool:
        calls = [pool.submit(convoy.call, n) for n in range(11)]
        assert line.started.acquire(timeout=10)
        until(lambda: len(convoy._waiting) == 11 - len(line.convoys[0]))
        line.go_on.release(11)
        assert [call.result(10) for call in calls] == [2 * n for n in range(11)]
    assert sum(map(len, line.convoys)) == 11
    assert max(map(len, line.convoys)) == 4


def test_what_fails_together_is_told_to_each_and_to_nobody_else(line):
    convoy = Convoy(line.run)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(convoy.call, 1)
        assert line.started.acquire(timeout=10)
        others = [pool.submit(convoy.call, n) for n in (-1, 2)]
        until(lambda: len(convoy._waiting) == 2)
        line.go_on.release(3)
        assert first.result(10) == 2
        for other in others:
            with pytest.raises(ValueError, match="too few"):
                other.result(10)
        assert pool.submit(convoy.call, 5).result(10) == 10


def test_items_of_a_convoy_that_fails_are_free_at_once():
    class Item:
        pass

    def run(items):
        raise ValueError("Redis is gone")

    def call():
        item = Item()
        freed.append(weakref.ref(item))
        with pytest.raises(ValueError, match="Redis is gone"):
            convoy.call(item)

    convoy = Convoy(run)
    freed: list[weakref.ref[Item]] = []
    gc.disable()
    try:
        call()
        assert freed[0]() is None
    finally:
        gc.enable()
