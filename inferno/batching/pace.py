"""How fast a worker gets through the tasks of a model."""

from __future__ import annotations

import msgspec


class Speed(msgspec.Struct, frozen=True):
    """What one or more workers can do when there is enough to do."""

    #: Tasks that are answered in a second.
    tasks_per_s: float
    #: Tasks that run at the same time: one batch in each executor.
    tasks_at_once: float

    def __add__(self, other: Speed) -> Speed:
        return Speed(self.tasks_per_s + other.tasks_per_s, self.tasks_at_once + other.tasks_at_once)

    def most_waiting(self, deadline_s: float) -> int:
        """Return how many tasks may be ahead of one that has to start within so many seconds.

        Those that run already and those that will share its batch are ahead of it too, but it does
        not wait for all of them: on average, one batch of each executor is for free.
        """
        return int(deadline_s * self.tasks_per_s + self.tasks_at_once)

    def wait_s(self, waiting: int) -> float:
        """Return how long a task with so many ahead of it waits for its start, in seconds."""
        return max(waiting - self.tasks_at_once, 0.0) / self.tasks_per_s


class Pace:
    """Measures one model's speed in one worker, as an exponentially weighted mean over batches.

    A batch that left with free seats counts as if it had been full, which costs a little more time
    than it took: few tasks at a time must not look like a slow worker. So the speed is rather too
    high while there is little to do, and right after a few full batches.
    """

    #: Of the last batch in the mean.
    WEIGHT = 0.2

    def __init__(self, max_rows: int, executors: int) -> None:
        """Begin without a measurement.

        Args:
          max_rows: of one batch.
          executors: batches that run at the same time.
        """
        self._max_rows = max_rows
        self._executors = executors
        self._seconds_per_task = 0.0
        self._tasks_per_batch = 0.0

    def note(self, tasks: int, rows: int, duration_s: float) -> None:
        """Take a batch into account.

        Args:
          tasks: in it.
          rows: of them together.
          duration_s: of its forward pass.
        """
        full = tasks * max(self._max_rows / rows, 1.0)
        # A clock that stands still must not make a worker infinitely fast.
        per_task = max(duration_s, 1e-6) / full
        weight = self.WEIGHT if self._seconds_per_task else 1.0
        self._seconds_per_task += weight * (per_task - self._seconds_per_task)
        self._tasks_per_batch += weight * (full - self._tasks_per_batch)

    @property
    def speed(self) -> Speed | None:
        """The speed, or None before the first batch."""
        if not self._seconds_per_task:
            return None
        return Speed(
            self._executors / self._seconds_per_task, self._executors * self._tasks_per_batch
        )
