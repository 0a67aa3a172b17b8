"""The books notice every kind of broken promise, and nothing else."""

from __future__ import annotations

import pytest

from tests.chaos.ledger import Fate, Ledger, Way
from tests.chaos.model.model import answer


def view(text: str, batch: str = "b1") -> dict[str, object]:
    """What a client sees of a task that succeeded."""
    outputs = {"text": {"dtype": "string", "shape": [1], "data": [answer(text)]}}
    return {"status": "succeeded", "outputs": outputs, "batch": {"id": batch}, "worker": "w"}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def text(ledger: Ledger) -> str:
    """A task that was accepted as `id`."""
    text = ledger.submit(Way.SOCKET)
    ledger.accept(text, "id")
    return text


def test_a_task_that_is_never_answered_is_found(ledger, text):
    other = ledger.submit(Way.SOCKET)
    ledger.accept(other, "other")
    ledger.answer("other", view(other))
    assert [submit.text for submit in ledger.unanswered()] == [text]
    assert ledger.pending == 1


def test_an_answer_that_everyone_sees_alike_breaks_no_promise(ledger, text):
    ledger.answer("id", view(text), "socket-1")
    ledger.answer("id", view(text), "socket-2")
    ledger.answer("id", {**view(text), "attempts": 1})
    assert (ledger.duplicates, ledger.wrong, ledger.unanswered()) == ([], [], [])
    assert (ledger.answered, ledger.pending) == (1, 0)


def test_an_answer_that_changes_is_a_duplicate(ledger, text):
    ledger.answer("id", view(text))
    ledger.answer("id", view(text, batch="b2"))
    assert [violation.text for violation in ledger.duplicates] == [text]
    assert ledger.answered == 1


def test_an_answer_that_is_pushed_twice_to_one_subscription_is_a_duplicate(ledger, text):
    ledger.answer("id", view(text), "socket-1")
    ledger.answer("id", view(text), "socket-1")
    assert [violation.text for violation in ledger.duplicates] == [text]


@pytest.mark.parametrize(
    "seen", [view("another task"), {"status": "failed", "error": {"code": "forward_failed"}}]
)
def test_a_wrong_value_and_an_error_are_found(ledger, text, seen):
    ledger.answer("id", seen)
    assert [violation.text for violation in ledger.wrong] == [text]


def test_an_answer_to_nobody_is_found(ledger, text):
    ledger.answer("stranger", view(text))
    assert [violation.task_id for violation in ledger.wrong] == ["stranger"]


def test_an_id_that_was_given_twice_is_found(ledger, text):
    other = ledger.submit(Way.POLL)
    ledger.accept(other, "id")
    assert [violation.text for violation in ledger.wrong] == [other]


def test_nobody_waits_for_what_was_refused_or_cut_off(ledger):
    refused, cut = ledger.submit(Way.SYNC), ledger.submit(Way.SYNC)
    ledger.refuse(refused, "broker_unavailable")
    ledger.cut([cut])
    assert ledger.fates == {Fate.REFUSED: 1, Fate.UNKNOWN: 1}
    assert ledger.refusals == {"broker_unavailable": 1}
    assert not ledger.unanswered()
    assert ledger.pending == 0
