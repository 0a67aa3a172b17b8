"""Which consumers count as dead, from their reports and connections."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.transport.lane import consumer_name
from tasks.transport.liveness import Liveness

#: Redis' time, in milliseconds.
NOW = 1_000_000

LEASE_MS = 60_000


class Redis:
    """Answers what a heartbeat asks of Redis."""

    def __init__(self, *connected: str, uptime_s: int = 1000) -> None:
        self.connected = connected
        self.uptime_s = uptime_s

    def client_list(self) -> list[dict[str, str]]:
        return [{"name": name} for name in self.connected]

    def info(self, section: str) -> dict[str, Any]:
        return {"uptime_in_seconds": self.uptime_s}


def reports(**silence_ms: int) -> list[bytes]:
    """Return one lane's consumers and reports, as Redis has them."""
    flat: list[bytes] = []
    for name, silence in silence_ms.items():
        flat += [name.encode(), f"{NOW - silence} {LEASE_MS}".encode()]
    return flat


def beat(liveness: Liveness, client: Any, *lanes: list[bytes]) -> list[set[str]]:
    liveness.begin()
    return [set(dead) for dead in liveness.dead(client, NOW, list(lanes))]


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(heartbeat_interval=0.5, grace=5.0)


def test_a_silent_consumer_without_connections_is_dead_at_the_second_look(liveness):
    lane = reports(silent=2000, recent=1000)
    assert beat(liveness, Redis(), lane) == [set()]
    assert beat(liveness, Redis(), lane) == [{"silent"}]


def test_absences_count_only_in_a_row(liveness):
    lane = reports(silent=2000)
    for client in (Redis(), Redis("silent"), Redis()):
        assert beat(liveness, client, lane) == [set()]
    assert beat(liveness, Redis(), lane) == [{"silent"}]


def test_a_consumer_with_connections_lives_until_its_lease_is_over(liveness):
    client = Redis("paused", "lost")
    for _ in range(3):
        lane = reports(paused=LEASE_MS - 1, lost=LEASE_MS + 1)
        assert beat(liveness, client, lane) == [{"lost"}]


def test_a_report_to_one_lane_counts_for_all(liveness):
    lanes = reports(both=LEASE_MS + 1), reports(both=0)
    assert beat(liveness, Redis(), *lanes) == [set(), set()]


def test_a_dead_consumer_is_dead_in_each_of_its_lanes(liveness):
    lanes = reports(lost=LEASE_MS + 1), reports(), reports(lost=LEASE_MS + 2)
    assert beat(liveness, Redis(), *lanes) == [{"lost"}, set(), {"lost"}]


def test_nobody_is_dead_soon_after_redis_has_started(liveness):
    lane = reports(lost=LEASE_MS + 1)
    assert beat(liveness, Redis(uptime_s=4), lane) == [set()]
    assert beat(liveness, Redis(uptime_s=6), lane) == [{"lost"}]


def test_nobody_is_dead_soon_after_this_process_has_reconnected(liveness):
    lane = [*reports(lost=LEASE_MS + 1), consumer_name().encode(), f"{NOW} 1".encode()]
    assert beat(liveness, Redis(), lane) == [set()]
    assert beat(liveness, Redis(), lane) == [set()]


def test_this_process_never_finds_itself_dead(liveness):
    lane = [consumer_name().encode(), b"1 1"]
    beat(liveness, Redis(), [])
    assert beat(liveness, Redis(), lane) == [set()]
