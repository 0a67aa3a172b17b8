"""The line: so many at a time, in the order in which they have joined."""

from __future__ import annotations

import threading

from inferno.testing.processes import wait_until
from workers.batches.turns import Line


def test_turns_come_in_the_order_of_joining_not_of_asking():
    line, went = Line(2), []
    for who in "abcd":
        line.join(who)

    def go(who):
        with line.turn(who):
            went.append(who)

    # Those who ask first have joined last.
    threads = [threading.Thread(target=go, args=(who,)) for who in "dcba"]
    for thread in threads:
        thread.start()
    wait_until(lambda: set(went) == {"a", "b"})
    assert line.leave("b")
    wait_until(lambda: len(went) == 3)
    assert went[2] == "c"
    assert line.leave("a")
    for thread in threads:
        thread.join(10)
    assert went[3] == "d"
    assert len(line) == 2


def test_a_turn_may_be_taken_again_until_one_leaves():
    line = Line(1)
    line.join("a")
    for _ in range(2):
        with line.turn("a"):
            pass
    assert line.leave("a")
    assert not line.leave("a")


def test_the_oldest_turn_that_is_not_over_is_known():
    line = Line(2)
    for who in "abc":
        line.join(who)
    assert line.first_began() is None
    with line.turn("b"):
        first = line.first_began()
    with line.turn("a"):
        assert line.first_began() == first
    line.leave("b")
    second = line.first_began()
    assert first is not None
    assert second is not None
    assert second > first
    line.leave("a")
    assert line.first_began() is None
