"""Batch step: the latency objective of a model, which replaces the window."""

from __future__ import annotations

from collections.abc import Callable


class Objective:
    """Keeps 95 of 100 tasks within a time limit, from acceptance to answer.

    A batch may wait for what is left of the limit after its pass and everything else: the way to
    the worker, the queue, settling. That remainder is learned from answered tasks. A late task
    adds 19 times as much to it as a task in time takes away, so it settles where 1 of 20 is late.
    """

    #: Change of the remainder by one late task, as a fraction of the objective.
    STEP = 0.02

    def __init__(self, p95: float) -> None:
        """Store the objective, in seconds."""
        self.p95 = p95
        self._remainder = 0.0

    def answered(self, latency: float) -> None:
        """Learn from an answered task.

        Args:
          latency: seconds from acceptance to answer.
        """
        step = self.STEP * self.p95 * (0.95 if latency > self.p95 else -0.05)
        self._remainder = min(max(self._remainder + step, 0.0), self.p95)

    def window(self, run: float) -> float:
        """Return how long a task may wait in the worker before a pass of `run` seconds."""
        return max(self.p95 - self._remainder - run, 0.0)

    def rows(self, most: int, waiting: int, predict: Callable[[int], float]) -> int:
        """Return the rows of the largest batch that meets the objective.

        A task that just missed a batch waits for that batch's pass and then for its own, so two
        passes must fit. If batches of that size would leave many tasks behind, full batches get
        more done.

        Args:
          most: rows of one forward pass, at most.
          waiting: rows that wait.
          predict: returns the seconds of a forward pass, given its rows.
        """
        suits = most
        while suits > 1 and 2 * predict(suits) > self.p95:
            suits //= 2
        return suits if waiting < 2 * suits else most
