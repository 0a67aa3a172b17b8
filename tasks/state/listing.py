"""Reading a sorted set of tasks by time, newest first, one page after the other.

A page begins after a place, not at an offset: what arrives meanwhile moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import redis

from tasks.broker.connection import translated

T = TypeVar("T")

#: Entries that one round trip reads.
CHUNK = 100
#: Chunks that one page looks at, at most.
CHUNKS = 10


@dataclass(frozen=True, order=True)
class Place:
    """An entry of the set."""

    #: In seconds since the epoch.
    at: float
    task_id: str


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some of what was asked for."""

    items: list[T]
    #: Where the next page begins; None at the end.
    last: Place | None


def read_page(
    client: redis.Redis,
    key: str,
    read: Callable[[Sequence[str]], Sequence[T | None]],
    wanted: Callable[[T], bool],
    most: int,
    after: Place | None,
) -> Page[T]:
    """Return what is wanted of a set, newest first.

    A page looks at a bounded number of entries, so it may be short or empty before the end.

    Args:
      client: answers in bytes.
      key: of the sorted set.
      read: returns what there is to each id; None is left out.
      wanted: what belongs to the page.
      most: items of the page.
      after: the last place of the page before.
    Raises:
      BrokerUnavailable: Redis does not answer.
    """
    items: list[T] = []
    for _ in range(CHUNKS):
        places = _places(client, key, after)
        for place, item in zip(places, read([place.task_id for place in places]), strict=True):
            after = place
            if item is not None and wanted(item):
                items.append(item)
                if len(items) == most:
                    return Page(items, after)
        if not places:
            return Page(items, None)
    return Page(items, after)


def _places(client: redis.Redis, key: str, after: Place | None) -> list[Place]:
    newest = "+inf" if after is None else repr(after.at)
    passed = 0
    while True:
        with translated():
            found = client.zrange(
                key, newest, "-inf",
                desc=True, byscore=True, offset=passed, num=CHUNK, withscores=True,
            )  # fmt: skip
        places = [
            Place(at, task_id.decode()) for task_id, at in cast(list[tuple[bytes, float]], found)
        ]
        # Of the same time, those with the greater id come first.
        fresh = [place for place in places if after is None or place < after]
        if fresh or not places:
            return fresh
        passed += len(places)
