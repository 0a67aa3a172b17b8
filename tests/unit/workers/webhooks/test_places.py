"""How receivers share the threads of the process that calls webhooks."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import pytest

from workers.webhooks import places as module
from workers.webhooks.places import Places


class Clock:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("workers.webhooks.places.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def places(threads: int = 8, per_receiver: int = 3) -> Places:
    return Places(threads, per_receiver, max_wait_s=60.0)


def take(shared: Places, name: str) -> AbstractContextManager[None]:
    place = shared.take(name)
    assert place is not None
    return place


def deliver(shared: Places, clock: Clock, name: str, duration_s: float = 0.01) -> None:
    """Make one delivery that is answered."""
    with take(shared, name):
        clock.now += duration_s


def test_a_receiver_gets_its_share_and_leaves_the_others_theirs(clock: Clock) -> None:
    shared = places()
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(take(shared, "a"))
        assert shared.take("a") is None
        assert shared.take("b") is not None
    assert shared.take("a") is not None


def test_receivers_that_are_not_known_to_be_quick_share_half_of_the_threads(clock: Clock) -> None:
    shared = places()
    deliver(shared, clock, "quick")
    deliver(shared, clock, "slow", module.QUICK_S)
    with ExitStack() as held:
        for name in ("slow", "new-1", "new-2", "new-3"):
            held.enter_context(take(shared, name))
        assert shared.take("slow") is None
        assert shared.take("new-4") is None
        assert shared.take("quick") is not None


def test_a_quick_receiver_that_does_not_answer_counts_as_slow(clock: Clock) -> None:
    shared = places(threads=2, per_receiver=2)
    deliver(shared, clock, "a")
    with take(shared, "other"):
        with pytest.raises(OSError, match="refused"), take(shared, "a"):
            raise OSError("refused")
        assert shared.take("a") is None


def test_those_that_wait_come_back_as_fast_as_places_become_free(clock: Clock) -> None:
    shared = places()
    deliver(shared, clock, "a")
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(take(shared, "a"))
        clock.now += 6.0
        waits = [shared.wait_s("a") for _ in range(4)]
    # Three places, held for six seconds each: one becomes free every two seconds.
    assert waits == pytest.approx([2.5, 4.5, 6.5, 8.5])


def test_new_receivers_wait_in_one_line(clock: Clock) -> None:
    shared = places()
    with ExitStack() as held:
        for number in range(4):
            held.enter_context(take(shared, f"silent-{number}"))
        clock.now += 8.0
        waits = [shared.wait_s(f"new-{number}") for number in range(3)]
    assert waits == pytest.approx([2.5, 4.5, 6.5])


def test_a_wait_has_a_limit(clock: Clock) -> None:
    shared = places(threads=2, per_receiver=1)
    with take(shared, "a"):
        clock.now += 50.0
        waits = [shared.wait_s("a") for _ in range(20)]
    assert all(30.0 <= wait_s <= 60.0 for wait_s in waits[2:])


def test_one_thread_is_enough(clock: Clock) -> None:
    shared = places(threads=1, per_receiver=16)
    with take(shared, "a"):
        assert shared.take("b") is None
    assert shared.take("b") is not None


def test_old_receivers_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECEIVERS", 2)
    shared = places(threads=2, per_receiver=2)
    deliver(shared, clock, "first")
    with take(shared, "busy"):
        deliver(shared, clock, "first")
        # "first" was used last, but "busy" must not be forgotten.
        assert shared.take("third") is None
    deliver(shared, clock, "fourth")
