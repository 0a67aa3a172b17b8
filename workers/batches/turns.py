"""Forward step: batches take turns on the executors, in the order in which they left the buffer.

The event loop adds batches; threads of the pool wait for their turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Lets the first `executors` batches of a queue have their forward passes; thread-safe.

    Threads begin at different speeds, so the order is that of joining: the batch that left the
    buffer first has its pass first.
    """

    def __init__(self, executors: int) -> None:
        """Store how many batches may have their passes at the same time."""
        self._executors = executors
        #: Ids of the batches that have not had their passes, in order.
        self._queue: list[str] = []
        #: Start time of each batch that is in its pass, on the monotonic clock.
        self._started: dict[str, float] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._queue)

    def join(self, batch_id: str) -> None:
        """Add a batch at the end."""
        with self._changed:
            self._queue.append(batch_id)

    @contextmanager
    def turn(self, batch_id: str) -> Iterator[None]:
        """Wait for the turn of a batch that has joined; it keeps its place until it leaves."""
        with self._changed:
            self._changed.wait_for(lambda: batch_id not in self._queue[self._executors :])
            self._started[batch_id] = time.monotonic()
        yield

    def oldest_start(self) -> float | None:
        """Return the start time of the oldest running pass, or None if none is running."""
        with self._changed:
            return min(self._started.values(), default=None)

    def leave(self, batch_id: str) -> bool:
        """Free the place of a batch; return whether it still had one."""
        with self._changed:
            if batch_id not in self._queue:
                return False
            self._queue.remove(batch_id)
            self._started.pop(batch_id, None)
            self._changed.notify_all()
            return True
