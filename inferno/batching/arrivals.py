"""Batch step: whether more tasks will join those that wait, judged from recent arrivals.

Pure: callers pass in the time, in seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import deque


class Arrivals:
    """Predicts whether other tasks will join the waiting ones.

    - Nobody is expected when everyone is here: as many tasks as were in the lane at once during the
      last batches. Clients that call again after each answer cannot be more.
    - Nobody is expected after a silence much longer than the gaps between the last arrivals.
    - A crowd that has come fast enough to fill the batch within the window is expected to go on,
      whatever the pauses: its calls come in bursts, because a batch's answers are delivered
      together.
    """

    #: Weight of the newest gap: about the last ten arrivals matter.
    WEIGHT = 0.2
    #: A silence of this many mean gaps ends a burst. 98 % of exponential gaps are shorter.
    SILENCE = 4.0
    #: Shortest silence that counts, in seconds: fetching and reading messages takes as long.
    PAUSE = 0.001
    #: Batches that are remembered.
    BATCHES = 8

    def __init__(self, window: float) -> None:
        """Start without evidence, as if nobody else came.

        Args:
          window: longest time to wait for others, in seconds.
        """
        self._window = window
        #: Exponentially weighted mean of the gaps between arrivals, in seconds. The first arrival
        #: after a pause does not tell how fast others follow. If a task was answered before the
        #: next one came, nobody joins (a lone client calls again only after its answer), so the
        #: mean starts anew.
        self._gap = window
        self._last = 0.0
        #: Arrivals since the lane was empty.
        self._together = 0
        #: Departure time of each of the last batches, and the number of arrivals until then.
        self._left: deque[tuple[float, int]] = deque(maxlen=self.BATCHES)
        self._arrived = 0
        #: Most tasks in the lane at once, for each of the last batches; the current one is last.
        self._most: deque[int] = deque([0], maxlen=self.BATCHES)
        #: Maximum of `_most`.
        self._peak = 0

    def arrived(self, now: float, in_lane: int) -> None:
        """Note an arrival.

        Args:
          now: the time.
          in_lane: tasks that wait or run, including this one.
        """
        self._arrived += 1
        if in_lane > self._most[-1]:
            self._most[-1] = in_lane
            self._peak = max(self._peak, in_lane)
        if in_lane > 1:
            self._together += 1
            self._gap += self.WEIGHT * (min(now - self._last, self._window) - self._gap)
        else:
            if self._together == 1:
                self._gap = self._window
            self._together = 1
        self._last = now

    def answered(self, now: float) -> None:
        """Note that tasks were answered: their clients may call again soon."""
        self._last = now

    def left(self, now: float) -> None:
        """Note that a batch has left."""
        self._left.append((now, self._arrived))
        self._most.append(0)
        self._peak = max(self._most)

    def expected_until(self, in_lane: int, seats: int, until: float, window: float) -> float:
        """Return the time until which another arrival is worth waiting for; it may be past.

        Args:
          in_lane: tasks that wait or run.
          seats: rows that the batch can still take.
          until: end of the batch's window.
          window: length of that window, in seconds.
        """
        if in_lane >= self._peak:
            return self._last
        since, before = self._left[0] if self._left else (self._last, self._arrived)
        if (self._arrived - before) * (until - self._last) >= seats * (self._last - since) > 0:
            return until
        silence = self.SILENCE * self._gap
        if silence >= window:
            return self._last  # The window would end before the silence proves anything.
        return self._last + max(silence, self.PAUSE)
