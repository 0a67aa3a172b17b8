"""Turns: as many at a time as there are executors, in the order of joining."""

from __future__ import annotations

import threading

from inferno.testing.processes import wait_until
from workers.batches.turns import Turns


def test_turns_come_in_the_order_of_joining_not_of_asking():
    turns, went = Turns(2), []
    for who in "abcd":
        turns.join(who)

    def go(who):
        with turns.turn(who):
            went.append(who)

    # The last to join ask first.
    threads = [threading.Thread(target=go, args=(who,)) for who in "dcba"]
    for thread in threads:
        thread.start()
    wait_until(lambda: set(went) == {"a", "b"})
    assert turns.leave("b")
    wait_until(lambda: len(went) == 3)
    assert went[2] == "c"
    assert turns.leave("a")
    for thread in threads:
        thread.join(10)
    assert went[3] == "d"
    assert len(turns) == 2


def test_a_turn_may_be_taken_again_until_one_leaves():
    turns = Turns(1)
    turns.join("a")
    for _ in range(2):
        with turns.turn("a"):
            pass
    assert turns.leave("a")
    assert not turns.leave("a")


def test_the_oldest_turn_that_is_not_over_is_known():
    turns = Turns(2)
    for who in "abc":
        turns.join(who)
    assert turns.oldest_start() is None
    with turns.turn("b"):
        first = turns.oldest_start()
    with turns.turn("a"):
        assert turns.oldest_start() == first
    turns.leave("b")
    second = turns.oldest_start()
    assert first is not None
    assert second is not None
    assert second > first
    turns.leave("a")
    assert turns.oldest_start() is None
