"""What the broker knows of tasks that workers hold: the one place that depends on its kind."""

from __future__ import annotations

import json
from dataclasses import dataclass

import redis


@dataclass(frozen=True)
class Holding:
    """What a worker holds: fetched, and not acknowledged."""

    count: int
    #: How long ago the last of it was fetched, in milliseconds.
    youngest_ms: float


def holding(client: redis.Redis, worker: str) -> Holding | None:
    """Return what a worker holds, by its node name; None where the broker cannot tell.

    Stock lists note what is held, and not by whom.
    """
    return None


def kept(client: redis.Redis) -> set[str]:
    """Return the ids of tasks that the broker counts as held by some worker, dead or alive.

    With stock lists these come back after the visibility timeout, an hour; a task that is in
    neither place is gone.
    """
    messages = [json.loads(value)[0] for value in client.hvals("unacked")]
    return {message["headers"]["id"] for message in messages}


def stale_settles(client: redis.Redis) -> int | None:
    """Return how many outcomes of workers that had lost their tasks were fenced off.

    None where nobody counts them.
    """
    return None
