"""Settle step: how fast a worker gets through the tasks of a model.

Workers report it; front ends refuse tasks that cannot start before their deadline.
"""

from __future__ import annotations

import msgspec


class Speed(msgspec.Struct, frozen=True):
    """Throughput of one or more workers at full load."""

    #: Tasks answered per second.
    tasks_per_s: float
    #: Tasks that run at the same time: one batch per executor.
    tasks_at_once: float

    def __add__(self, other: Speed) -> Speed:
        return Speed(self.tasks_per_s + other.tasks_per_s, self.tasks_at_once + other.tasks_at_once)

    def most_waiting(self, deadline_s: float) -> int:
        """Return how many tasks may be ahead of one that must start within `deadline_s` seconds.

        Running tasks and those that will share its batch count as ahead, but the task does not
        wait for all of them: on average, one batch per executor costs no waiting time.
        """
        return int(deadline_s * self.tasks_per_s + self.tasks_at_once)

    def wait_s(self, waiting: int) -> float:
        """Return how many seconds a task with `waiting` tasks ahead waits for its start."""
        return max(waiting - self.tasks_at_once, 0.0) / self.tasks_per_s


class Pace:
    """Measures one model's speed in one worker, as an exponentially weighted mean over batches.

    A batch that left with free seats counts as full, so that few tasks at a time do not look like
    a slow worker. A full batch would have taken a little longer, so the measured speed is too high
    under low load, and right after a few full batches.
    """

    #: Weight of the last batch in the mean.
    WEIGHT = 0.2

    def __init__(self, max_rows: int, executors: int) -> None:
        """Start without a measurement.

        Args:
          max_rows: rows of a full batch.
          executors: batches that run at the same time.
        """
        self._max_rows = max_rows
        self._executors = executors
        self._seconds_per_task = 0.0
        self._tasks_per_batch = 0.0

    def note(self, tasks: int, rows: int, duration_s: float) -> None:
        """Add a batch to the mean.

        Args:
          tasks: number of tasks in the batch.
          rows: total rows of these tasks.
          duration_s: time of its forward pass, in seconds.
        """
        full = tasks * max(self._max_rows / rows, 1.0)
        # A coarse clock may measure 0.
        per_task = max(duration_s, 1e-6) / full
        weight = self.WEIGHT if self._seconds_per_task else 1.0
        self._seconds_per_task += weight * (per_task - self._seconds_per_task)
        self._tasks_per_batch += weight * (full - self._tasks_per_batch)

    @property
    def speed(self) -> Speed | None:
        """The measured speed, or None before the first batch."""
        if not self._seconds_per_task:
            return None
        return Speed(
            self._executors / self._seconds_per_task, self._executors * self._tasks_per_batch
        )
