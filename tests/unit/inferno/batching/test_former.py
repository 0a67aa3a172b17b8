"""The batch former on a virtual clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferno.batching.arrivals import Arrivals
from inferno.batching.former import BatchFormer, Flush, FlushReason, WaitingTask, batch_key
from inferno.batching.simulation import Call, Report, Simulation, crowd, poisson
from tests.unit.inferno.traffic import bursts

WINDOW_S = 0.010
MAX_ROWS = 32


def former(max_rows: int = MAX_ROWS, *, adaptive: bool = False) -> BatchFormer[str]:
    return BatchFormer(max_rows, WINDOW_S, adaptive)


def waiting(
    task: str,
    arrived: float = 0.0,
    *,
    rows: int = 1,
    kind: str = "a",
    deadline: float | None = None,
) -> WaitingTask[str]:
    return WaitingTask(task, kind, rows, arrived, deadline)


def tasks(flush: Flush[str] | None) -> list[str]:
    assert flush is not None
    return [w.task for w in flush.members]


# When a batch leaves


def test_a_full_batch_leaves_at_once() -> None:
    batches = former(max_rows=3)
    for task in "ab":
        batches.add(waiting(task))
    assert batches.flush(0.0) is None
    batches.add(waiting("c"))
    flush = batches.flush(0.0)
    assert tasks(flush) == ["a", "b", "c"]
    assert flush is not None
    assert flush.reason is FlushReason.FULL
    assert len(batches) == 0


def test_a_batch_leaves_when_the_window_of_its_oldest_task_is_over() -> None:
    batches = former()
    batches.add(waiting("a", 1.0))
    batches.add(waiting("b", 1.008))
    assert batches.next_due() == pytest.approx(1.0 + WINDOW_S)
    assert batches.flush(1.0099) is None
    flush = batches.flush(1.0 + WINDOW_S)
    assert tasks(flush) == ["a", "b"]
    assert flush is not None
    assert flush.reason is FlushReason.WINDOW


def test_a_batch_leaves_in_time_for_the_earliest_deadline() -> None:
    batches = former()
    batches.add(waiting("patient", 1.0))
    batches.add(waiting("hurried", 1.001, deadline=1.009))
    due = 1.009 - BatchFormer.DEADLINE_MARGIN
    assert batches.next_due() == pytest.approx(due)
    assert batches.next_deadline() == 1.009
    flush = batches.flush(due)
    assert tasks(flush) == ["patient", "hurried"]
    assert flush is not None
    assert flush.reason is FlushReason.DEADLINE


def test_a_batch_leaves_so_early_that_its_pass_is_over_before_the_deadline() -> None:
    # Given passes of 1 s plus 0.1 s per row
    batches: BatchFormer[str] = BatchFormer(
        MAX_ROWS, 10.0, adaptive=False, predict=lambda key, rows: 1 + rows / 10
    )
    batches.add(waiting("hurried", 1.0, deadline=5.0))
    assert batches.next_due() == pytest.approx(5.0 - 1.1 - BatchFormer.DEADLINE_MARGIN)
    # When another task joins, the pass takes longer
    batches.add(waiting("patient", 1.0))
    assert batches.next_due() == pytest.approx(5.0 - 1.2 - BatchFormer.DEADLINE_MARGIN)
    # And a task that cannot end in time leaves at once, because it may still start in time
    batches.add(waiting("late", 1.0, deadline=1.5))
    assert tasks(batches.flush(1.0)) == ["hurried", "patient", "late"]


def test_a_late_deadline_changes_nothing() -> None:
    batches = former()
    batches.add(waiting("a", 1.0, deadline=9.0))
    assert batches.next_due() == pytest.approx(1.0 + WINDOW_S)


def test_nothing_leaves_where_nothing_waits() -> None:
    batches = former()
    assert batches.flush(99.0) is None
    assert batches.next_due() is None
    assert batches.next_deadline() is None


def test_without_evidence_that_others_come_a_task_leaves_at_once() -> None:
    batches = former(adaptive=True)
    batches.add(waiting("a", 1.0))
    flush = batches.flush(1.0)
    assert flush is not None
    assert flush.reason is FlushReason.IDLE


def test_a_window_of_zero_holds_nobody_back() -> None:
    for adaptive in (True, False):
        batches: BatchFormer[str] = BatchFormer(MAX_ROWS, 0.0, adaptive)
        batches.add(waiting("a", 1.0))
        assert tasks(batches.flush(1.0)) == ["a"]


# Who leaves together


def test_rows_are_counted_and_capped() -> None:
    # Given tasks of 20 rows each, and batches of 32
    batches = former()
    for task in "abc":
        batches.add(waiting(task, rows=20))
    # Then no two tasks fit into one batch
    assert [tasks(batches.flush(0.0)) for _ in "ab"] == [["a"], ["b"]]
    assert batches.flush(0.0) is None
    assert len(batches) == 1


def test_small_tasks_fill_up_a_batch_in_order() -> None:
    batches = former()
    for task, rows in (("a", 16), ("b", 15), ("c", 2), ("d", 1)):
        batches.add(waiting(task, rows=rows))
    assert tasks(batches.flush(0.0)) == ["a", "b"]
    assert tasks(batches.flush(WINDOW_S)) == ["c", "d"]


def test_a_task_over_the_limit_leaves_alone() -> None:
    batches = former()
    batches.add(waiting("huge", rows=100))
    batches.add(waiting("small"))
    assert tasks(batches.flush(0.0)) == ["huge"]
    assert tasks(batches.flush(WINDOW_S)) == ["small"]


def test_of_several_ready_groups_the_one_with_the_oldest_task_leaves_first() -> None:
    batches = former(max_rows=2)
    batches.add(waiting("a", 0.001, kind="a"))
    batches.add(waiting("b1", 0.002, kind="b"))
    batches.add(waiting("b2", 0.003, kind="b"))
    # Given a full batch, and later one whose window is over, too
    assert tasks(batches.flush(0.003)) == ["b1", "b2"]
    batches.add(waiting("b3", 0.004, kind="b"))
    batches.add(waiting("b4", 0.004, kind="b"))
    assert tasks(batches.flush(0.011)) == ["a"]
    assert tasks(batches.flush(0.011)) == ["b3", "b4"]


arrivals = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.floats(0, 0.02)), max_size=60
)


@given(arrivals=arrivals, adaptive=st.booleans(), max_rows=st.integers(1, 32))
def test_every_task_leaves_once_in_order_of_its_group_and_within_the_limits(
    arrivals: list[tuple[str, int, float]], adaptive: bool, max_rows: int
) -> None:
    # Given tasks of three keys, some of more rows than a batch takes
    batches: BatchFormer[int] = BatchFormer(max_rows, WINDOW_S, adaptive)
    now, left = 0.0, []
    for number, (kind, rows, gap) in enumerate(arrivals):
        now += gap
        batches.add(WaitingTask(number, kind, rows, now))
        while (flush := batches.flush(now)) is not None:
            left.append(flush)
    # When all waiting tasks become due
    while (due := batches.next_due()) is not None:
        flush = batches.flush(max(due, now))
        assert flush is not None
        left.append(flush)
    # Then each left once, in order, only with tasks of its key, and no batch is too large unless it
    # is a single task
    assert sorted(w.task for f in left for w in f.members) == list(range(len(arrivals)))
    assert len(batches) == 0
    for flush in left:
        assert len({w.key for w in flush.members}) == 1
        assert len(flush.members) == 1 or sum(w.rows for w in flush.members) <= max_rows
    for kind in "abc":
        order = [w.task for f in left for w in f.members if w.key == kind]
        assert order == sorted(order)


def test_dropped_tasks_make_room() -> None:
    batches = former(max_rows=3)
    for task in "abc":
        batches.add(waiting(task))
    batches.add(waiting("x", kind="b"))
    dropped = batches.drop(lambda w: w.task in "ax")
    assert sorted(w.task for w in dropped) == ["a", "x"]
    assert len(batches) == 2
    # Two rows are no longer a full batch
    assert batches.flush(0.0) is None
    assert tasks(batches.flush(WINDOW_S)) == ["b", "c"]


def test_dropping_nobody_changes_nothing() -> None:
    batches = former(max_rows=2)
    batches.add(waiting("a"))
    assert batches.drop(lambda _: False) == []
    batches.add(waiting("b"))
    assert tasks(batches.flush(0.0)) == ["a", "b"]


def test_clearing_forgets_everybody() -> None:
    batches = former()
    batches.add(waiting("a"))
    batches.clear()
    assert len(batches) == 0
    assert batches.next_due() is None


# Which tasks can share a batch


def test_tasks_of_equal_shapes_and_version_share_a_key() -> None:
    a = {"x": np.zeros((1, 3)), "m": np.zeros((1, 5))}
    b = {"m": np.zeros((4, 5)), "x": np.zeros((4, 3))}
    assert batch_key(1, a, ()) == batch_key(1, b, ())
    assert batch_key(1, a, ()) != batch_key(2, a, ())


def test_other_shapes_and_other_inputs_are_other_keys() -> None:
    base = {"x": np.zeros((1, 3))}
    for other in ({"x": np.zeros((1, 4))}, {"x": np.zeros((1, 3)), "m": np.zeros(1)}, {}):
        assert batch_key(1, base, ()) != batch_key(1, other, ())


def test_padded_inputs_may_differ_in_size() -> None:
    short, long = ({"ids": np.zeros((1, n)), "x": np.zeros((1, 2))} for n in (3, 9))
    assert batch_key(1, short, ("ids",)) == batch_key(1, long, ("ids",))
    assert batch_key(1, short, ("x",)) != batch_key(1, long, ("x",))


# The window adapts: simulations with a service time of 5 ms + 0.05 ms per row

#: Time of the front end for one task.
SPACING_S = 0.0003


def mock(tasks: int) -> float:
    return 0.005 + 0.00005 * tasks


def takes(pass_s: float, tasks: int) -> float:
    return pass_s


def by_the_row(tasks: int) -> float:
    return 0.0002 + 0.0049 * tasks


def unknown(tasks: int) -> float:
    return 0.0


def simulated_lane(
    *, adaptive: bool = True, predict: Callable[[int], float] = unknown, **fields: Any
) -> Simulation:
    former: BatchFormer[Call] = BatchFormer(
        MAX_ROWS, WINDOW_S, adaptive, lambda key, rows: predict(rows)
    )
    given: dict[str, Any] = {"busy": mock, "front_end": SPACING_S} | fields
    return Simulation(former, **given)


def closed_loop(clients: int, *, until: float = 3.0, **fields: Any) -> Report:
    simulation = simulated_lane(**fields)
    for at, client in crowd(clients, spacing=SPACING_S):
        simulation.call(at, client)
    return simulation.run(until)


def held(report: Report) -> list[float]:
    return [held for batch in report.batches for held in batch.held]


def test_a_lone_client_never_pays_the_window() -> None:
    report = closed_loop(1)
    assert report.mean_size == 1
    assert max(held(report)) == 0


def test_a_lone_client_does_not_pay_for_the_crowd_that_left() -> None:
    # Given a crowd that fills batches, and then leaves
    simulation = simulated_lane()
    for at, client in crowd(64):
        simulation.call(at, client)
    simulation.run(1.0)
    simulation.closed_loop = False
    simulation.run(2.0)
    # When one client stays
    simulation.closed_loop = True
    simulation.call(3.0, 0)
    first, *others = held(simulation.run(3.5))
    # Then at most its first call waits, for less than a fifth of the window
    assert first < WINDOW_S / 5
    assert max(others) == 0


@pytest.mark.parametrize("fetch", [0.0, 0.001, 0.003])
@pytest.mark.parametrize("clients", [64, 128])
def test_a_crowd_fills_its_batches(clients: int, fetch: float) -> None:
    assert closed_loop(clients, fetch=fetch).mean_size >= 31


@pytest.mark.parametrize("fetch", [0.0, 0.001, 0.003])
def test_a_crowd_fills_the_batches_of_a_model_that_takes_no_time(fetch: float) -> None:
    # Given a model whose passes take no time; only beginning and settling a batch does
    report = closed_loop(64, fetch=fetch, busy=lambda tasks: 0.0015 + 0.00003 * tasks)
    # Then batches are few, and the front end, which sets the pace, loses nothing
    assert report.mean_size >= 28
    assert report.tasks_per_s >= 0.98 / SPACING_S


@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_that_thinks_at_random_fills_its_batches(seed: int) -> None:
    source = random.Random(seed)
    report = closed_loop(64, think=lambda: source.expovariate(1 / 0.002))
    assert report.mean_size >= 31
    assert report.mean_held < WINDOW_S / 3


def test_a_crowd_is_recognised_soon_after_a_lone_client() -> None:
    simulation = simulated_lane()
    simulation.call(0.0, 0)
    simulation.run(0.3)
    for at, client in crowd(64, start=0.3):
        simulation.call(at, client + 1)
    sizes = [batch.size for batch in simulation.run(1.0).batches]
    assert MAX_ROWS in sizes[:6]
    assert min(sizes[6:]) >= 28


@pytest.mark.parametrize("clients", [2, 4, 8, 16])
def test_few_clients_do_not_wait_for_the_whole_window(clients: int) -> None:
    report = closed_loop(clients)
    assert report.mean_held < WINDOW_S / 2
    assert report.reasons[FlushReason.WINDOW] <= 1


@pytest.mark.parametrize("clients", [2, 8, 16])
def test_a_few_clients_share_their_passes_however_long_one_takes(clients: int) -> None:
    # Tasks that wait for the running pass do not leave just before its clients call again
    for pass_s in (0.005, 0.05, 0.5):
        report = closed_loop(clients, busy=partial(takes, pass_s), until=600 * pass_s)
        assert report.mean_size >= 0.95 * clients


@pytest.mark.parametrize("rate", [5, 20, 50, 100])
def test_a_low_rate_of_strangers_does_not_pay_the_window(rate: int) -> None:
    simulation = simulated_lane(closed_loop=False)
    for at, client in poisson(rate, until=20.0, seed=rate):
        simulation.call(at, client)
    assert simulation.run(21.0).mean_held < WINDOW_S / 100


def test_a_high_rate_of_strangers_fills_batches() -> None:
    simulation = simulated_lane(closed_loop=False)
    for at, client in poisson(3000, until=3.0, seed=1):
        simulation.call(at, client)
    assert simulation.run(4.0).mean_size >= 24


def test_no_executor_waits_for_rows_that_a_shared_pass_would_not_make_cheaper() -> None:
    # If two rows take as long as one row twice, independent tasks do not wait for each other.
    # So few of them arrive while both executors are busy
    simulation = simulated_lane(predict=by_the_row, busy=by_the_row, executors=2, closed_loop=False)
    for at, client in poisson(280, until=20.0):
        simulation.call(at, client)
    assert simulation.run(21.0).percentile(99) < 0.06


@pytest.mark.parametrize(
    ("busy", "free", "sizes"),
    [(by_the_row, 1, [5]), (by_the_row, 2, [3, 2]), (by_the_row, 3, [2, 2, 1]), (mock, 2, [5])],
)
def test_free_executors_share_what_one_could_take_if_all_are_done_sooner_then(
    busy: Callable[[int], float], free: int, sizes: list[int]
) -> None:
    batches: BatchFormer[str] = BatchFormer(
        MAX_ROWS, WINDOW_S, predict=lambda key, rows: busy(rows)
    )
    for task in "abcde":
        batches.add(waiting(task))
    flushed = []
    while (flush := batches.flush(WINDOW_S, free=free)) is not None:
        flushed.append(tasks(flush))
        free -= 1
    assert [len(members) for members in flushed] == sizes
    assert [task for members in flushed for task in members] == list("abcde")


@pytest.mark.parametrize(
    ("waits", "sizes"), [(MAX_ROWS, [16, 16]), (40, [20, 20]), (64, [32, 32]), (70, [32, 32])]
)
def test_free_executors_share_all_that_waits_in_full_batches_if_they_can(
    waits: int, sizes: list[int]
) -> None:
    batches: BatchFormer[str] = BatchFormer(
        MAX_ROWS, WINDOW_S, predict=lambda key, rows: by_the_row(rows)
    )
    for number in range(waits):
        batches.add(waiting(f"task {number}"))
    flushed = [batches.flush(WINDOW_S, free=free) for free in (2, 1)]
    assert [len(flush.members) for flush in flushed if flush] == sizes


def test_a_crowd_that_is_too_small_for_full_batches_keeps_all_executors_busy() -> None:
    # Given calls that arrive together, such as the next calls of one batch's clients
    report = closed_loop(
        16, predict=by_the_row, busy=by_the_row, executors=2, fetch=0.003, front_end=0.0
    )
    assert report.tasks_per_s >= 0.9 * 16 / (by_the_row(8) + 0.003)


def in_passes(tasks: int) -> float:
    """Predict as an engine does: more rows than one pass takes need several passes."""
    whole, rest = divmod(tasks, MAX_ROWS)
    return whole * mock(MAX_ROWS) + (mock(rest) if rest else 0.0)


@pytest.mark.parametrize("rows", [1, 15, 17, 24, 31])
def test_the_rows_that_a_pass_still_takes_are_worth_waiting_for_however_few(rows: int) -> None:
    batches: BatchFormer[str] = BatchFormer(
        MAX_ROWS, 10 * WINDOW_S, predict=lambda key, rows: in_passes(rows)
    )
    # Given a crowd that is fast enough to fill a batch within the window
    for number in range(MAX_ROWS):
        batches.add(waiting("earlier", number / 10_000))
    assert batches.flush(0.0031) is not None
    # When some of its next calls have arrived, and an executor is free since the last of them
    for number in range(rows):
        batches.add(waiting("next", 0.0032 + number / 10_000))
    last = 0.0032 + (rows - 1) / 10_000
    batches.freed(last)
    # Then the batch waits for as long as a second pass would cost
    due = batches.next_due()
    assert due is not None
    assert due - last == pytest.approx(0.005 + BatchFormer.OVERHEAD)


@pytest.mark.parametrize("clients", [64, 128])
def test_a_crowd_fills_its_batches_where_passes_are_known_to_be_worth_sharing(clients: int) -> None:
    assert closed_loop(clients, predict=in_passes).mean_size >= 31


def test_a_crowd_waits_for_no_more_than_a_batch_costs_where_passes_take_no_time() -> None:
    report = closed_loop(64, predict=lambda tasks: 0.00005, busy=lambda tasks: 0.0015)
    assert report.mean_size >= 8
    assert max(held(report)) <= BatchFormer.OVERHEAD + 0.0001
    assert report.tasks_per_s >= 0.98 / SPACING_S


def test_strangers_who_come_together_leave_together() -> None:
    simulation = simulated_lane(closed_loop=False)
    for at, client in bursts(16, every=0.1, until=3.0):
        simulation.call(at, client)
    report = simulation.run(4.0)
    assert {batch.size for batch in report.batches[1:]} == {16}
    assert report.mean_held < WINDOW_S / 5


def test_nobody_is_held_back_for_longer_than_the_window() -> None:
    for clients in (1, 3, 8, 40, 64, 200):
        assert max(held(closed_loop(clients, until=1.0))) <= WINDOW_S + 1e-9


def test_two_executors_share_a_crowd() -> None:
    report = closed_loop(128, executors=2, front_end=0.0001)
    assert report.mean_size >= 28


def test_without_adaptation_a_lone_client_pays_the_window() -> None:
    simulation = simulated_lane(adaptive=False)
    simulation.call(0.0, 0)
    assert simulation.run(0.5).mean_held == pytest.approx(WINDOW_S)


def test_the_end_of_a_burst_is_known_after_a_few_gaps() -> None:
    crowd = Arrivals(WINDOW_S)
    for number in range(40):
        crowd.arrived(number * SPACING_S, in_lane=number + 1)
    last = 39 * SPACING_S
    # If one task of the crowd is missing, it is expected, but not for long
    until = crowd.expected_until(39, seats=1, until=last + WINDOW_S, window=WINDOW_S)
    assert last < until < last + WINDOW_S / 5
    # If all are here, no other task is expected
    assert crowd.expected_until(40, seats=1, until=last + WINDOW_S, window=WINDOW_S) == last


def test_many_tasks_are_added_and_asked_about_without_looking_at_each_other() -> None:
    # Given more waiting tasks than any worker holds, each with a deadline
    batches: BatchFormer[int] = BatchFormer(10**9, 1e9, adaptive=True)
    asked = Counting()
    for number in range(20_000):
        deadline = asked if number == 0 else 1e9
        batches.add(WaitingTask(number, "a", 1, 0.0, deadline, since=number))
        batches.next_due()
        batches.next_deadline()
    # Then the first deadline is compared a few times per arrival, not once per pair
    assert Counting.compared < 10 * 20_000


class Counting(float):
    """A deadline that counts how often it is compared."""

    compared = 0

    def __new__(cls) -> Counting:
        return super().__new__(cls, 1e6)

    def __lt__(self, other: float) -> bool:
        Counting.compared += 1
        return super().__lt__(other)

    def __gt__(self, other: float) -> bool:
        Counting.compared += 1
        return super().__gt__(other)
