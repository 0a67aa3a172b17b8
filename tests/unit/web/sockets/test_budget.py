"""Sockets share a number of bytes, and the one that wastes most is closed for the others."""

from __future__ import annotations

import threading

import pytest

from web.sockets.budget import Budget, Share


class Holder:
    """A socket that notes that it was closed."""

    def __init__(self, budget: Budget, held: int = 0, idle_s: float = 0.0) -> None:
        self.evictions = 0
        self.share: Share = budget.join(self.evict)
        self.share.take(held)
        self.share.progressed_at -= idle_s

    def evict(self) -> None:
        self.evictions += 1


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Budget:
    monkeypatch.setattr(Budget, "PATIENCE_S", 0.02)
    return Budget(100)


def test_bytes_that_fit_close_nobody(budget):
    holders = [Holder(budget, 50), Holder(budget, 50)]
    assert budget.held == 100
    for holder in holders:
        holder.share.give(50)
    assert budget.held == 0
    assert [holder.evictions for holder in holders] == [0, 0]


def test_who_holds_most_for_longest_makes_room(budget):
    small, large, busy = Holder(budget, 10, 5), Holder(budget, 40, 5), Holder(budget, 50)
    busy.share.take(20)
    assert [holder.evictions for holder in (small, large, busy)] == [0, 1, 0]
    assert budget.held == 80
    # What a closed socket still gives back was counted already.
    large.share.give(40)
    large.share.take(10)
    assert budget.held == 80


def test_one_message_always_fits(budget):
    holder = Holder(budget)
    holder.share.take(1000)
    assert (budget.held, holder.evictions) == (1000, 0)


def test_as_many_are_closed_as_it_takes(budget):
    holders = [Holder(budget, 20, idle_s) for idle_s in (1, 2, 3, 4, 5)]
    holders[0].share.take(60)
    assert [holder.evictions for holder in holders] == [0, 0, 1, 1, 1]
    assert budget.held == 100


def test_patient_taker_waits_for_others_first(monkeypatch):
    monkeypatch.setattr(Budget, "PATIENCE_S", 20)
    budget = Budget(100)
    first, second = Holder(budget, 80), Holder(budget)
    taking = threading.Thread(target=lambda: second.share.take(80, patient=True))
    taking.start()
    first.share.give(80)
    taking.join(10)
    assert not taking.is_alive()
    assert (budget.held, first.evictions) == (80, 0)


def test_patience_ends(budget):
    first, second = Holder(budget, 80, 5), Holder(budget)
    second.share.take(80, patient=True)
    assert (budget.held, first.evictions, second.evictions) == (80, 1, 0)


def test_what_a_socket_held_is_free_when_it_leaves(budget):
    holder = Holder(budget, 70)
    budget.leave(holder.share)
    assert (budget.held, holder.evictions) == (0, 0)
