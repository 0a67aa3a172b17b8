"""The batch former: which waiting tasks leave together, and when.

It holds no clock, no thread and no queue: the consumer tells it what arrived and what the time is,
and asks what should leave. So its decisions can be tested on a virtual clock. All times are seconds
of one monotonic clock.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

from inferno.errors import ForwardFailed
from inferno.protocol.tensors import Tensors

T = TypeVar("T")


class FlushReason(StrEnum):
    """Why a batch left."""

    #: It holds as many rows as one forward pass takes.
    FULL = "full"
    #: Its oldest task has waited for the whole window.
    WINDOW = "window"
    #: Nobody else is expected before the window is over.
    IDLE = "idle"
    #: A deadline would otherwise be missed.
    DEADLINE = "deadline"
    #: A part of a batch that failed, run again to find the guilty member.
    ISOLATED = "isolated"


@dataclass(frozen=True)
class Waiting(Generic[T]):
    """One waiting task."""

    task: T
    #: What it can share a forward pass with: only tasks of an equal bucket.
    bucket: Hashable
    rows: int
    arrived: float
    #: When its forward pass must have started, or None.
    deadline: float | None = None
    #: Higher leaves sooner.
    priority: int = 0
    #: Of equal priorities, the one that waits since an earlier time leaves sooner. Its clock may be
    #: another one, of the machine where the task was accepted.
    since: float = 0.0

    @property
    def rank(self) -> tuple[int, float]:
        """Its place in the line: lower leaves sooner."""
        return -self.priority, self.since


@dataclass(frozen=True)
class Flush(Generic[T]):
    """A batch that should leave now."""

    reason: FlushReason
    members: list[Waiting[T]]


@dataclass
class _Bucket(Generic[T]):
    #: In the order in which they leave.
    waiting: list[Waiting[T]] = field(default_factory=list)
    rows: int = 0

    @property
    def oldest(self) -> float:
        """When the task arrived that has waited here for the longest."""
        return min(waiting.arrived for waiting in self.waiting)


class ArrivalGap:
    """How long until the next task joins those that wait.

    An exponentially weighted mean of the gaps between arrivals. Only an arrival that finds others
    in the lane counts: the first one after a pause says nothing of how fast others follow. When a
    task was answered before the next one came, nobody joins (a lone client calls again only after
    its answer), so the mean begins anew.
    """

    #: Weight of the newest gap: about the last ten arrivals matter.
    WEIGHT = 0.2
    #: A silence of so many mean gaps means that a burst is over: of exponential gaps, 98 % are
    #: shorter.
    SILENCE = 4.0
    #: No silence is shorter than this, in seconds: fetching and reading messages takes as long.
    PAUSE = 0.001

    def __init__(self, window: float) -> None:
        """Begin without evidence, as if nobody else came."""
        self._window = window
        self._mean = window
        self._last = 0.0
        #: Arrivals since the lane was empty.
        self._together = 0

    def arrived(self, now: float, *, alone: bool) -> None:
        """Take note of an arrival; `alone` says that no other task was in the lane."""
        if not alone:
            self._together += 1
            self._mean += self.WEIGHT * (min(now - self._last, self._window) - self._mean)
        else:
            if self._together == 1:
                self._mean = self._window
            self._together = 1
        self._last = now

    def expected_until(self) -> float:
        """Return until when another arrival is worth waiting for; it may be over."""
        silence = self.SILENCE * self._mean
        if silence >= self._window:
            return self._last  # The window would end before it is known that nobody else comes.
        return self._last + max(silence, self.PAUSE)


class BatchFormer(Generic[T]):
    """Collects waiting tasks of one lane and says when a batch leaves.

    A batch leaves when an executor is free and it is full, or its oldest task's window is over, or
    a deadline would be missed, or nobody else is expected. While every executor is busy, arrivals
    gather for nothing.
    """

    #: How long before a deadline its batch leaves, in seconds, so that the pass starts in time.
    DEADLINE_MARGIN = 0.005

    def __init__(self, max_rows: int, window: float, adaptive: bool = True) -> None:
        """Set the policy.

        Args:
          max_rows: rows of one forward pass, at most.
          window: how long the oldest waiting task may be held back, in seconds.
          adaptive: end the window early when nobody else is expected.
        """
        self.max_rows = max_rows
        self.window = window
        self._gap = ArrivalGap(window) if adaptive else None
        self._buckets: dict[Hashable, _Bucket[T]] = {}
        self._running = 0

    def __len__(self) -> int:
        return sum(len(bucket.waiting) for bucket in self._buckets.values())

    def add(self, waiting: Waiting[T]) -> None:
        """Take in a task that arrived."""
        if self._gap is not None:
            self._gap.arrived(waiting.arrived, alone=not self._buckets and not self._running)
        bucket = self._buckets.setdefault(waiting.bucket, _Bucket())
        insort(bucket.waiting, waiting, key=lambda w: w.rank)
        bucket.rows += waiting.rows

    def started(self) -> None:
        """Take note that a flushed batch occupies an executor."""
        self._running += 1

    def finished(self) -> None:
        """Take note that an executor is free again."""
        self._running -= 1

    def flush(self, now: float) -> Flush[T] | None:
        """Return the batch that should leave now, if any; to be asked when an executor is free."""
        ready = [(due, key) for key in self._buckets if (due := self._due(key))[0] <= now]
        if not ready:
            return None
        # Of several that are ready, the one whose first task comes first.
        (_, reason), key = min(ready, key=lambda item: self._buckets[item[1]].waiting[0].rank)
        return Flush(reason, self._take(key))

    def next_reason(self, now: float) -> FlushReason | None:
        """Say why a batch should leave now, or None when none should."""
        ready = [reason for due, reason in map(self._due, self._buckets) if due <= now]
        return None if not ready else min(ready, key=lambda reason: reason is not FlushReason.FULL)

    def next_due(self) -> float | None:
        """Return when a batch will leave if nothing else arrives, or None when nothing waits."""
        return min((self._due(key)[0] for key in self._buckets), default=None)

    def next_deadline(self) -> float | None:
        """Return the earliest deadline of a waiting task, or None when none has one."""
        deadlines = (
            w.deadline for b in self._buckets.values() for w in b.waiting if w.deadline is not None
        )
        return min(deadlines, default=None)

    def drop(self, condition: Callable[[Waiting[T]], bool]) -> list[Waiting[T]]:
        """Remove and return the waiting tasks for which the condition holds."""
        dropped: list[Waiting[T]] = []
        for key, bucket in list(self._buckets.items()):
            kept: list[Waiting[T]] = []
            for waiting in bucket.waiting:
                (dropped if condition(waiting) else kept).append(waiting)
            self._replace(key, kept)
        return dropped

    def clear(self) -> None:
        """Forget every waiting task: the broker will hand them over again."""
        self._buckets.clear()

    def _due(self, key: Hashable) -> tuple[float, FlushReason]:
        bucket = self._buckets[key]
        oldest = bucket.oldest
        if bucket.rows >= self.max_rows:
            return oldest, FlushReason.FULL
        due, reason = oldest + self.window, FlushReason.WINDOW
        if self._gap is not None and (until := self._gap.expected_until()) < due:
            due, reason = until, FlushReason.IDLE
        deadline = min((w.deadline for w in bucket.waiting if w.deadline is not None), default=None)
        if deadline is not None and deadline - self.DEADLINE_MARGIN < due:
            due, reason = deadline - self.DEADLINE_MARGIN, FlushReason.DEADLINE
        return due, reason

    def _take(self, key: Hashable) -> list[Waiting[T]]:
        waiting = self._buckets[key].waiting
        count, rows = 1, waiting[0].rows
        while count < len(waiting) and rows + waiting[count].rows <= self.max_rows:
            rows += waiting[count].rows
            count += 1
        members = waiting[:count]
        self._replace(key, waiting[count:])
        return members

    def _replace(self, key: Hashable, waiting: list[Waiting[T]]) -> None:
        if waiting:
            self._buckets[key] = _Bucket(waiting, sum(w.rows for w in waiting))
        else:
            self._buckets.pop(key, None)


def bucket(version: int, inputs: Tensors, pad: Sequence[str]) -> Hashable:
    """Say which tasks can share a forward pass: those whose buckets are equal.

    Args:
      version: of the model.
      inputs: the task's arrays by name.
      pad: names of inputs whose free dimensions are padded, so that their sizes may differ.
    """
    shapes = tuple(
        sorted((name, () if name in pad else array.shape[1:]) for name, array in inputs.items())
    )
    return version, shapes


class Undecided(ForwardFailed):
    """The passes for isolating a failing batch are spent.

    This member may be innocent, so it is tried again.
    """

    transient = True


def isolate(
    members: Sequence[T], run: Callable[[Sequence[T]], Sequence[Any]]
) -> Iterator[tuple[T, Any | Exception]]:
    """Run members together and, where that fails, in halves, until a guilty one stands alone.

    One guilty member of n costs 1 + 2 log2(n) passes; with twice as many spent (all of 32 guilty
    would cost 63), those that were not decided are `Undecided`.

    Args:
      members: at least one.
      run: answers members with one forward pass, or raises.
    Yields:
      Each member once, with its answer or the error.
    """
    budget = 2 + 4 * math.ceil(math.log2(len(members)))
    parts = deque([list(members)])
    while parts:
        part = parts.popleft()
        if budget <= 0:
            undecided = Undecided("its batch failed, and it could not be tried alone")
            yield from ((member, undecided) for member in part)
            continue
        budget -= 1
        answered: list[tuple[T, Any | Exception]]
        try:
            answered = list(zip(part, run(part), strict=True))
        except Exception as exc:
            if len(part) > 1 and (not is_transient(exc) or isinstance(exc, MemoryError)):
                middle = len(part) // 2
                parts += [part[:middle], part[middle:]]
                continue
            answered = [(member, exc) for member in part]
        yield from answered


def is_transient(exc: BaseException) -> bool:
    """Return whether an error may pass by itself, so that the same task can succeed later.

    A model says so by the attribute `transient` of what it raises; running out of memory and broken
    connections are, unless it says otherwise.
    """
    return bool(
        getattr(exc, "transient", isinstance(exc, MemoryError | ConnectionError | TimeoutError))
    )
