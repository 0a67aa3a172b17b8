"""Pages of a sorted set of tasks by time, newest first.

A page begins after a place and not at an offset, so tasks that arrive meanwhile do not shift it.
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
#: Most chunks that one page reads.
CHUNKS = 10


@dataclass(frozen=True, order=True)
class Place:
    """An entry of the set."""

    #: Seconds since the epoch.
    at: float
    task_id: str


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list."""

    items: list[T]
    #: The place after which the next page begins; None at the end of the list.
    last: Place | None


def read_page(
    client: redis.Redis,
    key: str,
    read: Callable[[Sequence[str]], Sequence[T | None]],
    wanted: Callable[[T], bool],
    most: int,
    after: Place | None,
) -> Page[T]:
    """Return one page of a sorted set, newest first.

    A page reads a limited number of entries, so it may be short or empty before the end.

    Args:
      client: answers in bytes.
      key: key of the sorted set.
      read: returns the item of each id, or None when it is gone.
      wanted: whether an item belongs on the page.
      most: most items of the page.
      after: last place of the page before.
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
        # Entries with equal times come by descending id.
        fresh = [place for place in places if after is None or place < after]
        if fresh or not places:
            return fresh
        passed += len(places)
