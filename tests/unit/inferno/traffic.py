"""Arrivals that only tests simulate."""

from __future__ import annotations

from collections.abc import Iterator


def bursts(size: int, every: float, until: float) -> Iterator[tuple[float, int]]:
    """Yield calls that come `size` at a time, as (time, client)."""
    for number in range(int(until / every)):
        for client in range(size):
            yield number * every, number * size + client
