"""The line in which batches wait for their forward pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Line:
    """Lets so many at a time go on, in the order in which they have joined.

    The order is that of joining, not of asking: threads begin at different speeds, and what has
    left the buffer first shall have its pass first.
    """

    def __init__(self, places: int) -> None:
        """Store how many may go on at the same time."""
        self._places = places
        self._line: list[str] = []
        #: When the turns of those began that have theirs, by the monotonic clock.
        self._began: dict[str, float] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._line)

    def join(self, who: str) -> None:
        """Take the last place."""
        with self._changed:
            self._line.append(who)

    @contextmanager
    def turn(self, who: str) -> Iterator[None]:
        """Wait for the turn of one that has joined; it keeps its place until it leaves."""
        with self._changed:
            self._changed.wait_for(lambda: who not in self._line[self._places :])
            self._began[who] = time.monotonic()
        yield

    def first_began(self) -> float | None:
        """Return when the oldest turn began that is not over, or None when nobody has one."""
        with self._changed:
            return min(self._began.values(), default=None)

    def leave(self, who: str) -> bool:
        """Let others go on; returns whether it was in the line."""
        with self._changed:
            if who not in self._line:
                return False
            self._line.remove(who)
            self._began.pop(who, None)
            self._changed.notify_all()
            return True
