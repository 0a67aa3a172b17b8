"""What load is made of, and what is made of it."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import islice, pairwise

import pytest

from bench.load import arrivals, latency_ms, percentile
from bench.workloads import MARK, Numbers, texts


@pytest.mark.parametrize(
    ("percent", "expected"), [(1, 1), (50, 50), (90, 90), (99, 99), (99.5, 100), (100, 100)]
)
def test_a_percentile_is_the_value_that_so_many_do_not_exceed(percent, expected):
    assert percentile(list(range(1, 101)), percent) == expected


def test_a_single_value_is_every_percentile():
    assert latency_ms([0.25]) == dict.fromkeys(("p50", "p90", "p95", "p99", "max"), 250.0)


def test_latencies_are_milliseconds_in_any_order():
    found = latency_ms([0.004, 0.001, 0.003, 0.002])
    assert (found["p50"], found["p99"], found["max"]) == (2.0, 4.0, 4.0)
    assert latency_ms([]) == {}


def test_arrivals_are_those_of_a_poisson_process():
    times = list(arrivals(1000, 20, seed=1))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 20
    # Gaps of an exponential distribution spread as far as they are long.
    assert statistics.mean(gaps) == pytest.approx(0.001, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.001, rel=0.05)


def test_a_seed_gives_the_same_arrivals():
    assert list(arrivals(50, 2, seed=1)) == list(arrivals(50, 2, seed=1))
    assert list(arrivals(50, 2, seed=1)) != list(arrivals(50, 2, seed=2))


def test_no_text_is_sent_twice():
    numbers = Numbers()
    ranges = [list(islice(texts(numbers.first()), 3000)) for _ in range(3)]
    assert len({text for some in ranges for text in some}) == 9000


def test_each_range_of_texts_has_numbers_of_all_kinds():
    numbers = Numbers()
    for some in (islice(texts(numbers.first()), 3000) for _ in range(3)):
        leading = Counter(text.partition(MARK)[2][0] for text in some)
        assert all(leading[digit] == pytest.approx(3000 / 9, rel=0.2) for digit in "123456789")


def test_texts_are_of_varied_length_and_need_no_escapes():
    some = list(islice(texts(1), 2000))
    assert len({len(text.split()) for text in some}) > 5
    assert all(text.isascii() and text.isprintable() for text in some)
    assert not any(sign in text for text in some for sign in '"\\@')
