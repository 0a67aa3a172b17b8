"""What the broker knows of tasks that workers hold: the one place that depends on its kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import redis

from inferno import names
from inferno.settings import RedisSettings
from tasks.transport import StreamLane
from tests.chaos.load import MODEL

LANE = StreamLane.of(MODEL)


@dataclass(frozen=True)
class Holding:
    """What a worker holds: fetched, and not acknowledged."""

    count: int
    #: How long ago the last of it was fetched, in milliseconds.
    youngest_ms: float


def holding(client: redis.Redis, pid: int) -> Holding | None:
    """Return what the worker of a process holds; None where the broker cannot tell.

    Stock lists note what is held, and not by whom.
    """
    consumer = _consumer(client, pid)
    if consumer is None:
        return None
    idle_ms = list(_idle_ms(client, consumer))
    return Holding(len(idle_ms), min(idle_ms, default=0))


def _consumer(client: redis.Redis, pid: int) -> str | None:
    if pid not in _consumers:
        names_of_all = cast(list[bytes], client.hkeys(f"{LANE.key}:consumers"))
        _consumers.update((int(name.split(b":")[-2]), name.decode()) for name in names_of_all)
    return _consumers.get(pid)


#: The names of worker processes as consumers, by their id.
_consumers: dict[int, str] = {}


def _idle_ms(client: redis.Redis, consumer: str) -> Iterator[float]:
    for stream in LANE.streams:
        if client.exists(stream):
            pending = client.xpending_range(stream, "workers", "-", "+", 1000, consumer)
            yield from (float(entry["time_since_delivered"]) for entry in pending)


def kept(client: redis.Redis) -> set[str]:
    """Return the ids of tasks that the broker still has, held by some worker, dead or alive.

    With stock lists these come back after the visibility timeout, an hour; a task that is in
    neither place is gone.
    """
    messages = [json.loads(value)[0] for value in client.hvals("unacked")]
    for stream in LANE.streams:
        entries = cast(list[tuple[bytes, dict[bytes, bytes]]], client.xrange(stream))
        messages += [json.loads(fields[b"message"]) for _, fields in entries]
    return {message["headers"]["id"] for message in messages}


def stale_settles(client: redis.Redis) -> int:
    """Return how many outcomes of workers that had lost their tasks were fenced off."""
    return int(client.hget(names.counters_key(RedisSettings().prefix), "stale") or 0)
