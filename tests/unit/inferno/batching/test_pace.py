"""How fast a worker is, from its batches."""

from __future__ import annotations

import pytest

from inferno.batching.pace import Pace, Speed


def test_nothing_is_known_before_the_first_batch():
    assert Pace(8, 1).speed is None


@pytest.mark.parametrize("executors", [1, 3])
def test_full_batches_give_the_exact_speed(executors):
    pace = Pace(8, executors)
    for _ in range(3):
        pace.note(tasks=8, rows=8, duration_s=2.0)
    speed = pace.speed
    assert speed is not None
    assert speed.tasks_per_s == pytest.approx(4 * executors)
    assert speed.tasks_at_once == pytest.approx(8 * executors)


def test_lone_task_counts_as_a_full_batch():
    pace = Pace(32, 1)
    pace.note(tasks=1, rows=1, duration_s=0.5)
    assert pace.speed == Speed(64.0, 32.0)


def test_tasks_of_several_rows_fill_a_batch_sooner():
    pace = Pace(32, 1)
    pace.note(tasks=2, rows=16, duration_s=1.0)
    assert pace.speed == Speed(4.0, 4.0)
    # More rows than a full batch: the task ran in pieces.
    pace = Pace(32, 1)
    pace.note(tasks=1, rows=320, duration_s=1.0)
    assert pace.speed == Speed(1.0, 1.0)


def test_newer_batches_count_more():
    pace = Pace(1, 1)
    pace.note(1, 1, 10.0)
    for _ in range(30):
        pace.note(1, 1, 0.1)
    speed = pace.speed
    assert speed is not None
    assert speed.tasks_per_s == pytest.approx(10, rel=0.2)


def test_clock_that_stands_still_does_no_harm():
    pace = Pace(1, 1)
    pace.note(1, 1, 0.0)
    assert pace.speed is not None


def test_what_runs_already_is_not_waited_for():
    speed = Speed(tasks_per_s=10.0, tasks_at_once=5.0) + Speed(10.0, 5.0)
    assert speed.most_waiting(0.5) == 20
    assert speed.wait_s(20) == pytest.approx(0.5)
    assert speed.wait_s(3) == 0.0
