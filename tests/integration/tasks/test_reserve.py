"""New tasks leave memory of Redis to those that were accepted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from inferno.errors import BrokerUnavailable
from inferno.settings import Settings
from inferno.testing.processes import redis_server
from tasks.broker.connection import connect
from tasks.intake.reserve import Reserve

MAXMEMORY_BYTES = 50_000_000
TASK_BYTES = 100_000


@pytest.fixture(scope="module")
def full_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def store(full_url: str) -> Iterator[redis.Redis]:
    with connect(Settings(redis={"url": full_url})) as client:
        client.config_set("maxmemory", MAXMEMORY_BYTES)
        yield client
        client.acl_setuser("default", enabled=True, nopass=True, categories=["+@all"])
        client.flushall()


def free_bytes(store: redis.Redis) -> int:
    return MAXMEMORY_BYTES - store.info("memory")["used_memory"]


@pytest.mark.parametrize(("share", "reserve"), [(0.2, 10_000_000), (0.01, 4_000_000)])
def test_processes_that_submit_at_once_leave_the_reserve_free(store, share, reserve):
    settings = Settings(redis={"reserve": share})
    processes = [Reserve(store, settings) for _ in range(4)]

    def submit() -> None:
        for n in range(2 * MAXMEMORY_BYTES // TASK_BYTES):
            processes[n % 4].take(TASK_BYTES)
            store.set(f"task:{n}", "x" * TASK_BYTES)

    with pytest.raises(BrokerUnavailable, match=r"nearly full: \d\d % of its memory"):
        submit()
    # No more than the tasks of a reading is missing, and the reserve is not larger than it says.
    assert 0.9 * reserve < free_bytes(store) < 1.5 * reserve


def test_calls_between_two_readings_count(store, monkeypatch):
    reserve = Reserve(store, Settings())
    monkeypatch.setattr(reserve, "SHARE_OF_READING", 1)
    reserve.take(0)
    monkeypatch.setattr(store, "info", None)
    taken = 0
    for _ in range(int(0.7 * MAXMEMORY_BYTES) // TASK_BYTES):
        reserve.take(TASK_BYTES)
        taken += TASK_BYTES
    most = int(0.9 * MAXMEMORY_BYTES) - taken
    with pytest.raises(BrokerUnavailable):
        reserve.take(most)


@pytest.mark.parametrize(("share", "maxmemory"), [(0, MAXMEMORY_BYTES), (0.1, 0)])
def test_without_reserve_or_limit_nothing_is_refused(store, share, maxmemory):
    store.config_set("maxmemory", maxmemory)
    Reserve(store, Settings(redis={"reserve": share})).take(10**12)


def test_a_user_without_info_is_warned_and_not_refused(store, caplog):
    store.acl_setuser("default", enabled=True, nopass=True, commands=["-info"])
    reserve = Reserve(store, Settings())
    for _ in range(2):
        reserve.take(10**12)
    assert [r.getMessage().partition(" INFO ")[0] for r in caplog.records] == [
        "new tasks are refused only when Redis is full:"
    ]
