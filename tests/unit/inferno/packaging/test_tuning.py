"""What is proposed for a model, from what was measured of it; and simulations of the same."""

from __future__ import annotations

import pytest

from inferno.batching.former import FlushReason
from inferno.batching.simulation import crowd, poisson, recorded
from inferno.packaging.tuning import (
    FRONT_END_S,
    Choice,
    Measured,
    candidates,
    choices,
    quickest,
    recommend,
    simulate,
)
from tests.unit.inferno.traffic import bursts

#: An accelerator: 5 ms a pass, and 0.05 ms for each row.
MOCK = Measured("mock", 1, "cpu", 1, 2, {n: 0.005 + 0.00005 * n for n in (1, 2, 4, 8, 16, 32)})
#: A processor: every row takes as long as the first.
LINEAR = Measured("cpu", 1, "cpu", 1, 2, {n: 0.010 * n for n in (1, 2, 4, 8)})


def test_the_best_batch_is_the_smallest_that_gets_almost_most_done():
    assert MOCK.best == 32
    assert LINEAR.best == 1


def test_the_executors_that_get_most_done_are_taken_unless_fewer_do_almost_as_much():
    def executors(number: int, seconds: float) -> Measured:
        return Measured("m", 1, "cpu", number, 4 // number, {1: seconds})

    assert quickest([executors(1, 0.010), executors(2, 0.010)]).executors == 2
    assert quickest([executors(1, 0.010), executors(2, 0.0195)]).executors == 1


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [(1, 1)]), (2, [(1, 2), (2, 1)]), (8, [(1, 8), (2, 4), (8, 1)])]
)
def test_executors_share_the_cores(cores, expected):
    assert candidates(cores) == expected


def run(measured: Measured, arrivals, *, size: int = 32, delay_ms: float = 10.0, **more) -> Choice:
    given = {"until": 5.0, "closed_loop": False} | more
    return simulate(measured, arrivals, max_batch_size=size, max_batch_delay_ms=delay_ms, **given)


def test_the_same_arrivals_give_the_same_report():
    first, again = (run(MOCK, poisson(500, 5.0)).report for _ in "ab")
    assert first == again
    assert first.latencies


def test_a_crowd_is_answered_in_full_batches_as_fast_as_the_model_can():
    report = run(MOCK, crowd(64), closed_loop=True).report
    assert report.mean_size >= 31
    assert report.reasons.most_common(1)[0][0] is FlushReason.FULL
    # A batch of 32 takes 6.6 ms, and beginning and settling it 1.5 ms
    assert report.tasks_per_s == pytest.approx(32 / 0.0081, rel=0.1)


def test_every_call_of_strangers_is_answered_once():
    for arrivals in (poisson(300, 4.0), bursts(20, 0.1, 4.0), recorded([7.5, 7.0, 9.0])):
        calls = list(arrivals)
        report = run(MOCK, calls).report
        answered = [call for batch in report.batches for call in batch.calls]
        assert sorted(call.client for call in answered) == [client for _, client in calls]
        assert len(report.latencies) == len(calls)


def test_recorded_times_begin_at_zero_and_in_order():
    assert list(recorded([7.5, 7.0, 9.0])) == [(0.0, 0), (0.5, 1), (2.0, 2)]


def test_a_latency_holds_the_wait_the_pass_and_what_surrounds_it():
    report = run(MOCK, [(1.0, 0)]).report
    assert report.percentile(50) == pytest.approx(0.0015 + 0.00505)


def test_without_an_objective_what_gets_most_done_is_proposed():
    choice = recommend(list(choices(MOCK, rate=None)), slo_p95_ms=None, rate=None)
    assert choice is not None
    assert choice.max_batch_size == 32
    assert choice.report.tasks_per_s >= 0.7 / FRONT_END_S


def test_an_objective_is_met_at_the_expected_rate():
    simulated = list(choices(MOCK, rate=1500))
    choice = recommend(simulated, slo_p95_ms=20.0, rate=1500)
    assert choice is not None
    assert choice.p95_ms <= 20.0
    assert choice.report.tasks_per_s >= 0.95 * 1500
    # One by one, this rate is far too high
    alone = [other for other in simulated if other.max_batch_size == 1]
    assert min(other.p95_ms for other in alone) > 1000


#: A fast processor: 2 ms a pass, and 2.5 ms for each row.
ROWS = Measured("rows", 1, "cpu", 1, 1, {n: 0.002 + 0.0025 * n for n in (1, 2, 4, 8, 16, 32)})


@pytest.mark.parametrize(
    ("measured", "rate", "slo_p95_ms"),
    [(MOCK, 500, 15), (MOCK, 500, 30), (MOCK, 1500, 15), (MOCK, 2500, 15), (ROWS, 250, 50),
     (ROWS, 250, 100), (ROWS, 330, 100)],
)  # fmt: skip
def test_the_window_is_as_long_as_an_objective_allows(measured, rate, slo_p95_ms):
    choice = run(measured, poisson(rate, 20.0), until=20.0, slo_p95_ms=slo_p95_ms)
    settled = sorted(choice.report.latencies[len(choice.report.latencies) // 4 :])
    p95_ms = settled[int(0.95 * len(settled))] * 1000
    assert 0.9 * slo_p95_ms <= p95_ms <= 1.03 * slo_p95_ms


def test_a_generous_objective_fills_batches():
    assert run(MOCK, poisson(500, 20.0), until=20.0, slo_p95_ms=100).report.mean_size >= 31


def test_an_objective_keeps_batches_small_whose_rows_take_long():
    # Given passes of 82 ms for 32 rows, and clients enough to fill them
    report = run(ROWS, crowd(6), closed_loop=True, slo_p95_ms=50).report
    # Then two passes are within the objective
    assert max(batch.size for batch in report.batches) <= 8


def test_an_objective_out_of_reach_costs_no_throughput():
    # Given a crowd that waits for longer than the objective in any case
    report = run(MOCK, crowd(64), closed_loop=True, slo_p95_ms=1).report
    assert report.mean_size >= 28


@pytest.mark.parametrize(("slo_p95_ms", "rate"), [(1.0, 100), (None, 10_000)])
def test_what_cannot_be_met_is_not_proposed(slo_p95_ms, rate):
    assert recommend(list(choices(MOCK, rate=rate)), slo_p95_ms=slo_p95_ms, rate=rate) is None
