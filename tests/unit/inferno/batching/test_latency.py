"""The latency curve: measured points, corrections by real passes, and predictions."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferno.batching.latency import LatencyCurve

MOCK = {1: 0.00505, 2: 0.0051, 4: 0.0052, 8: 0.0054, 16: 0.0058, 32: 0.0066}


def test_nothing_is_predicted_before_anything_was_measured() -> None:
    assert LatencyCurve().predict(8) == 0.0


@pytest.mark.parametrize("size", [1, 3, 8, 20, 32, 100])
def test_what_lies_between_and_beyond_the_points_is_on_their_line(size: int) -> None:
    assert LatencyCurve(MOCK).predict(size) == pytest.approx(0.005 + 0.00005 * size)


def test_one_point_holds_for_all_sizes() -> None:
    curve = LatencyCurve({4: 0.5})
    assert [curve.predict(size) for size in (1, 4, 9)] == [0.5] * 3


def test_a_lasting_change_is_believed_after_a_few_passes() -> None:
    curve = LatencyCurve(MOCK)
    for _ in range(60):
        curve.note(32, 0.02)
    assert curve.predict(32) == pytest.approx(0.02, rel=0.1)
    # Other points stay as they were
    assert curve.predict(8) == MOCK[8]


def test_one_hiccup_says_little() -> None:
    curve = LatencyCurve(MOCK)
    curve.note(32, 10.0)
    assert curve.predict(32) <= 1.1 * MOCK[32]


def test_a_pass_between_two_points_moves_both() -> None:
    curve = LatencyCurve(MOCK)
    for _ in range(200):
        curve.note(24, 0.01)
    assert curve.predict(24) == pytest.approx(0.01, rel=0.05)


def test_a_pass_that_is_much_larger_becomes_a_point() -> None:
    curve = LatencyCurve(MOCK)
    curve.note(256, 0.5)
    assert curve.points == MOCK | {256: 0.5}


def test_points_that_contradict_each_other_give_way_to_the_newest() -> None:
    curve = LatencyCurve({1: 0.1, 2: 0.2, 4: 0.3})
    curve.measured(4, 0.05)
    assert curve.points == {1: 0.05, 2: 0.05, 4: 0.05}
    curve.measured(1, 0.4)
    assert curve.points == {1: 0.4, 2: 0.4, 4: 0.4}


sizes = st.integers(1, 10_000)
seconds = st.floats(1e-6, 1e3)


@given(
    measured=st.dictionaries(sizes, seconds, max_size=8),
    passes=st.lists(st.tuples(sizes, seconds), max_size=30),
    asked=st.lists(sizes, min_size=2, max_size=8),
)
def test_larger_passes_are_never_predicted_to_be_shorter(
    measured: dict[int, float], passes: list[tuple[int, float]], asked: list[int]
) -> None:
    curve = LatencyCurve(measured)
    for size, took in passes:
        curve.note(size, took)
    predicted = [curve.predict(size) for size in sorted(asked)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(predicted))
    assert min(predicted) >= 0.0


def test_noisy_passes_lead_to_the_truth() -> None:
    # Given a machine that has become twice as fast, except for a few much slower passes
    source = random.Random(1)
    curve = LatencyCurve(MOCK)
    for _ in range(2000):
        size = source.randint(1, 32)
        noise = 10 if source.random() < 0.03 else source.uniform(0.9, 1.1)
        curve.note(size, noise * (0.0025 + 0.000025 * size))
    for size in (1, 8, 24, 32):
        assert curve.predict(size) == pytest.approx(0.0025 + 0.000025 * size, rel=0.15)
