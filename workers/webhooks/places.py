"""Deliver step of webhooks: share the threads of the process among the receivers.

A delivery occupies a thread until its receiver answers. So one receiver gets only some of the
threads, and all receivers that have not shown that they are quick get half of them together. What
finds no place is told when to come back; until then it waits in the broker, without a thread.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

#: Number of receivers to remember. The oldest are forgotten first.
MAX_RECEIVERS = 10_000

#: Longest delivery to a quick receiver, in seconds.
QUICK_S = 1.0

#: Shortest time to come back after, in seconds: the broker moves due messages twice a second.
MIN_WAIT_S = 0.5

#: Weight of the latest delivery in the mean duration.
WEIGHT = 0.2


@dataclass
class _Share:
    """Places that some deliveries have in common."""

    limit: int
    #: Start times of the running deliveries.
    began: list[float] = field(default_factory=list)
    #: Moving average of the duration of a delivery, in seconds.
    mean_s: float = 0.0
    #: Time at which the last one of those that wait comes back.
    line_end: float = 0.0

    @property
    def is_full(self) -> bool:
        return len(self.began) >= self.limit

    def leave(self, began: float, now: float) -> None:
        self.began.remove(began)
        self.mean_s += WEIGHT * (now - began - self.mean_s)

    def queue(self, now: float) -> float:
        """Add one to those that wait; returns in how many seconds it comes back.

        They come back one after the other, as fast as places become free.
        """
        duration_s = max(self.mean_s, now - min(self.began, default=now))
        self.line_end = max(self.line_end, now + MIN_WAIT_S) + duration_s / self.limit
        return self.line_end - now


@dataclass
class _Receiver(_Share):
    #: Whether it answered the latest delivery within `QUICK_S`.
    is_quick: bool = False


class Places:
    """Decides which deliveries may run; thread-safe."""

    def __init__(self, threads: int, per_receiver: int, max_wait_s: float) -> None:
        """Share threads among receivers.

        Args:
          threads: number of threads that deliver.
          per_receiver: most threads that one receiver may occupy.
          max_wait_s: longest time to come back after, in seconds.
        """
        self._per_receiver = min(per_receiver, threads)
        self._max_wait_s = max_wait_s
        self._lock = threading.Lock()
        #: Of all receivers that are not known to be quick.
        self._slow = _Share(max(threads // 2, 1))
        #: By name; the latest used last.
        self._receivers: OrderedDict[str, _Receiver] = OrderedDict()

    def has_one(self, name: str) -> bool:
        """Return whether a receiver has a free place at this moment."""
        with self._lock:
            return not any(share.is_full for share in self._shares(self._receiver(name)))

    def take(self, name: str) -> AbstractContextManager[None] | None:
        """Return a place for a delivery to a receiver, or None when there is none.

        The place is free again after the `with` block. An exception there counts as no answer.
        """
        began = time.monotonic()
        with self._lock:
            receiver = self._receiver(name)
            shares = self._shares(receiver)
            if any(share.is_full for share in shares):
                return None
            for share in shares:
                share.began.append(began)
        return self._hold(receiver, shares, began)

    def wait_s(self, name: str) -> float:
        """Return in how many seconds to try again, for a delivery that has found no place."""
        now = time.monotonic()
        with self._lock:
            shares = self._shares(self._receiver(name))
            wait_s = max(
                share.queue(now) for share in shares if share.is_full or share is shares[0]
            )
        if wait_s < self._max_wait_s:
            return wait_s
        # At random, so that they do not all come back together.
        return self._max_wait_s * random.uniform(0.5, 1)

    @contextmanager
    def _hold(self, receiver: _Receiver, shares: list[_Share], began: float) -> Iterator[None]:
        answered = False
        try:
            yield
            answered = True
        finally:
            now = time.monotonic()
            with self._lock:
                receiver.is_quick = answered and now - began < QUICK_S
                for share in shares:
                    share.leave(began, now)

    def _shares(self, receiver: _Receiver) -> list[_Share]:
        return [receiver] if receiver.is_quick else [receiver, self._slow]

    def _receiver(self, name: str) -> _Receiver:
        receiver = self._receivers.get(name)
        if receiver is None:
            if len(self._receivers) >= MAX_RECEIVERS:
                idle = (known for known, share in self._receivers.items() if not share.began)
                del self._receivers[next(idle)]
            receiver = self._receivers[name] = _Receiver(self._per_receiver)
        self._receivers.move_to_end(name)
        return receiver
