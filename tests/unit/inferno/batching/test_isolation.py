"""The isolation of bad members."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferno.batching.isolation import Undecided, is_transient, isolate


class Poisoned(ValueError):
    """The fault of a member."""


class Passing(RuntimeError):
    """A transient fault."""

    transient = True


def passes(guilty: set[int]) -> Any:
    """Return a model that fails on batches with a guilty member, and a list of its batches."""
    seen: list[list[int]] = []

    def run(part: Sequence[int]) -> list[int]:
        seen.append(list(part))
        if guilty & set(part):
            raise Poisoned(f"one of {part}")
        return [member * 10 for member in part]

    return run, seen


def test_a_good_batch_takes_one_pass() -> None:
    run, seen = passes(set())
    assert list(isolate([1, 2, 3], run)) == [(1, 10), (2, 20), (3, 30)]
    assert seen == [[1, 2, 3]]


@given(size=st.integers(1, 64), data=st.data())
def test_a_bad_member_fails_alone(size: int, data: st.DataObject) -> None:
    guilty = data.draw(st.integers(0, size - 1))
    run, seen = passes({guilty})
    outcomes = dict(isolate(range(size), run))
    assert len(outcomes) == size
    assert isinstance(outcomes.pop(guilty), Poisoned)
    assert outcomes == {member: member * 10 for member in outcomes}
    assert len(seen) <= 1 + 2 * math.ceil(math.log2(size))


@given(size=st.integers(1, 64), data=st.data())
def test_exactly_the_guilty_fail_within_the_budget_and_nobody_innocent_beyond_it(
    size: int, data: st.DataObject
) -> None:
    guilty = data.draw(st.sets(st.integers(0, size - 1)))
    run, seen = passes(guilty)
    outcomes = list(isolate(range(size), run))
    # Each member has exactly one outcome
    assert sorted(member for member, _ in outcomes) == list(range(size))
    budget = 2 + 4 * math.ceil(math.log2(size))
    assert len(seen) <= budget
    for member, outcome in outcomes:
        if isinstance(outcome, Undecided):
            # Only if the budget was spent; such a member may be retried
            assert len(seen) == budget
            assert is_transient(outcome)
        elif member in guilty:
            assert isinstance(outcome, Poisoned)
        else:
            assert outcome == member * 10
    if len(guilty) <= 2:
        assert not any(isinstance(outcome, Undecided) for _, outcome in outcomes)


def test_a_whole_batch_of_bad_members_is_not_worth_all_its_passes() -> None:
    run, seen = passes(set(range(32)))
    outcomes = list(isolate(range(32), run))
    assert len(outcomes) == 32
    assert len(seen) == 22
    assert any(isinstance(outcome, Undecided) for _, outcome in outcomes)


@pytest.mark.parametrize("error", [Passing("soon"), ConnectionError("gone"), TimeoutError("slow")])
def test_a_transient_error_is_everyones_and_splits_nothing(error: Exception) -> None:
    seen = []

    def run(part: Sequence[int]) -> list[int]:
        seen.append(part)
        raise error

    assert list(isolate([1, 2, 3], run)) == [(1, error), (2, error), (3, error)]
    assert len(seen) == 1


def test_a_batch_that_does_not_fit_into_memory_is_split_until_it_fits() -> None:
    def run(part: Sequence[int]) -> list[int]:
        if len(part) > 8:
            raise MemoryError
        return list(part)

    assert sorted(isolate(range(32), run)) == [(n, n) for n in range(32)]


def test_a_member_that_does_not_fit_alone_may_be_tried_again() -> None:
    def run(part: Sequence[int]) -> list[int]:
        raise MemoryError

    ((_, error),) = isolate([1], run)
    assert isinstance(error, MemoryError)
    assert is_transient(error)


@pytest.mark.parametrize("answers", [[], [1], [1, 2, 3]])
def test_a_wrong_number_of_answers_is_a_failed_pass(answers: list[int]) -> None:
    outcomes = list(isolate(["a", "b"], lambda _: answers))
    assert [member for member, _ in outcomes] == ["a", "b"]
    singles = [isinstance(outcome, ValueError) for _, outcome in outcomes]
    # For a single member, one answer is the right number
    assert all(singles) or answers == [1]


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ValueError(), False),
        (RuntimeError(), False),
        (MemoryError(), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (Passing(), True),
        (Undecided("?"), True),
    ],
)
def test_which_errors_may_pass(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


def test_an_error_can_say_that_it_will_not_pass() -> None:
    error = ConnectionError("the licence has ended")
    error.transient = False  # type: ignore[attr-defined]
    assert not is_transient(error)
