"""Batch step: which waiting tasks leave together, and when.

Pure, so that its decisions can be tested on a virtual clock: no clock, thread or queue. The
consumer reports arrivals and the time, and asks what should leave. All times are seconds of one
monotonic clock.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from inferno.batching.arrivals import Arrivals
from inferno.batching.objective import Objective
from inferno.protocol.tensors import Tensors

T = TypeVar("T")


class FlushReason(StrEnum):
    """Why a batch left."""

    #: It holds as many rows as one forward pass takes.
    FULL = "full"
    #: Its oldest task has waited for the whole window.
    WINDOW = "window"
    #: No other task is expected before the window ends.
    IDLE = "idle"
    #: Waiting longer would miss a task's deadline.
    DEADLINE = "deadline"
    #: Part of a failed batch, run again to find the failing member.
    ISOLATED = "isolated"


class WaitingTask(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """One waiting task."""

    task: T
    #: Tasks of equal keys can share a forward pass.
    key: Hashable
    rows: int
    arrived: float
    #: Latest start of its forward pass, or None.
    deadline: float | None = None
    #: Higher leaves sooner.
    priority: int = 0
    #: Orders tasks of equal priority: earlier leaves sooner. May be read from another clock, such
    #: as that of the machine which accepted the task.
    since: float = 0.0


@dataclass(frozen=True)
class Flush(Generic[T]):
    """A batch that should leave now."""

    reason: FlushReason
    members: list[WaitingTask[T]]


class _Group(Generic[T]):
    """Waiting tasks of one key in the order in which they leave, with cached aggregates."""

    def __init__(self, waiting: list[WaitingTask[T]], ranks: list[tuple[int, float]]) -> None:
        self.waiting = waiting
        #: Sort keys of `waiting`: lower leaves sooner.
        self.ranks = ranks
        self.rows = sum(w.rows for w in waiting)
        #: Earliest arrival.
        self.oldest = min((w.arrived for w in waiting), default=math.inf)
        #: Earliest deadline.
        self.deadline = min((w.deadline for w in waiting if w.deadline is not None), default=None)

    def add(self, waiting: WaitingTask[T]) -> None:
        rank = (-waiting.priority, waiting.since)
        if not self.ranks or rank >= self.ranks[-1]:
            self.ranks.append(rank)
            self.waiting.append(waiting)
        else:
            place = bisect_right(self.ranks, rank)
            self.ranks.insert(place, rank)
            self.waiting.insert(place, waiting)
        self.rows += waiting.rows
        self.oldest = min(self.oldest, waiting.arrived)
        deadline = waiting.deadline
        if deadline is not None and (self.deadline is None or deadline < self.deadline):
            self.deadline = deadline


class BatchFormer(Generic[T]):
    """Collects the waiting tasks of one lane and decides when a batch leaves.

    While an executor is free, a batch leaves when it is full, when its oldest task's window is
    over, when a deadline would be missed, when no other task is expected, or when waiting longer
    would cost more than it can save. While every executor is busy, waiting is free.
    """

    #: Reserve before a deadline, besides the time of the pass, in seconds.
    DEADLINE_MARGIN = 0.005
    #: Cost of a batch besides its pass, in seconds: fetching, beginning and settling it, in the
    #: worker and in Redis.
    OVERHEAD = 0.002

    def __init__(
        self,
        max_rows: int,
        window: float,
        adaptive: bool = True,
        predict: Callable[[Any, int], float] = lambda key, rows: 0.0,
        objective: float | None = None,
    ) -> None:
        """Set the policy.

        Args:
          max_rows: rows of one forward pass, at most.
          window: how long the oldest waiting task may be held back while an executor is free, in
            seconds.
          adaptive: end the window early when no other task is expected, or waiting costs more than
            it saves.
          predict: returns the predicted seconds of a forward pass, given its key and rows.
          objective: latency that 95 of 100 tasks must keep, in seconds. It replaces the window,
            and may make batches smaller.
        """
        self.max_rows = max_rows
        self.window = window if objective is None else objective
        self._objective = None if objective is None else Objective(objective)
        self._arrivals = Arrivals(self.window) if adaptive else None
        self._predict = predict
        self._groups: dict[Hashable, _Group[T]] = {}
        #: Tasks in `_groups`.
        self._waiting = 0
        #: Tasks that have left and are not answered yet.
        self._running = 0
        self._free_since = -math.inf

    def __len__(self) -> int:
        return self._waiting

    def add(self, waiting: WaitingTask[T]) -> None:
        """Add a task that arrived."""
        group = self._groups.get(waiting.key)
        if group is None:
            group = self._groups[waiting.key] = _Group([], [])
        group.add(waiting)
        self._waiting += 1
        if self._arrivals is not None:
            self._arrivals.arrived(waiting.arrived, self._waiting + self._running)

    def started(self, tasks: int) -> None:
        """Note that a flushed batch of `tasks` tasks occupies an executor."""
        self._running += tasks

    def freed(self, now: float) -> None:
        """Note that a forward pass is over, and its executor is free."""
        self._free_since = now

    def finished(self, tasks: int, now: float) -> None:
        """Note that the tasks of a batch are answered."""
        self._running -= tasks
        if self._arrivals is not None:
            self._arrivals.answered(now)

    def answered(self, latency: float) -> None:
        """Note that a task was answered `latency` seconds after it was accepted."""
        if self._objective is not None:
            self._objective.answered(latency)

    def flush(self, now: float, *, free: int = 1) -> Flush[T] | None:
        """Return the batch that should leave now, if any.

        Args:
          now: the time.
          free: number of free executors. With none, only a full batch leaves. Several may share
            the rows that one could take.
        """
        ready = [
            (due, key)
            for key in self._groups
            if (due := self._due(key))[0] <= now and (free or due[1] is FlushReason.FULL)
        ]
        if not ready:
            return None
        # If several groups are ready, the one with the most urgent task leaves.
        (_, reason), key = min(ready, key=lambda item: self._groups[item[1]].ranks[0])
        if self._arrivals is not None:
            self._arrivals.left(now)
        return Flush(reason, self._take(key, free))

    def next_reason(self, now: float) -> FlushReason | None:
        """Return why a batch should leave now, or None if none should."""
        ready = [reason for due, reason in map(self._due, self._groups) if due <= now]
        return None if not ready else min(ready, key=lambda reason: reason is not FlushReason.FULL)

    def next_due(self) -> float | None:
        """Return when a batch leaves if nothing else arrives, or None if nothing waits."""
        return min((self._due(key)[0] for key in self._groups), default=None)

    def next_deadline(self) -> float | None:
        """Return the earliest deadline of a waiting task, or None if none has one."""
        deadlines = [g.deadline for g in self._groups.values() if g.deadline is not None]
        return min(deadlines, default=None)

    def drop(self, condition: Callable[[WaitingTask[T]], bool]) -> list[WaitingTask[T]]:
        """Remove and return the waiting tasks that meet a condition."""
        dropped: list[WaitingTask[T]] = []
        for key, group in list(self._groups.items()):
            gone = {place for place, w in enumerate(group.waiting) if condition(w)}
            if gone:
                dropped += (group.waiting[place] for place in sorted(gone))
                self._keep(key, [n for n in range(len(group.waiting)) if n not in gone])
        return dropped

    def clear(self) -> None:
        """Forget all waiting tasks; the broker delivers them again."""
        self._groups.clear()
        self._waiting = 0

    def _due(self, key: Hashable) -> tuple[float, FlushReason]:
        """Return when the tasks of a key leave if nothing else arrives, and why."""
        group = self._groups[key]
        limit = self._limit(key)
        if group.rows >= limit:
            return group.oldest, FlushReason.FULL
        if self._objective is None:
            window = self.window if self._arrivals is None else self._worthwhile(key, limit)
            due = max(group.oldest, self._free_since) + window
        else:
            window = self._objective.window(self._predict(key, group.rows))
            due = group.oldest + window
        reason = FlushReason.WINDOW
        if self._arrivals is not None:
            in_lane, seats = self._waiting + self._running, limit - group.rows
            until = self._arrivals.expected_until(in_lane, seats, due, window)
            if until < due:
                due, reason = until, FlushReason.IDLE
        if group.deadline is not None:
            latest = group.deadline - self._predict(key, group.rows) - self.DEADLINE_MARGIN
            if latest < due:
                due, reason = latest, FlushReason.DEADLINE
        return due, reason

    def _worthwhile(self, key: Hashable, limit: int) -> float:
        """Return how long an executor may stay free for more rows, in seconds.

        Waiting for as many rows again, or as many as one pass still takes, saves one batch: its
        overhead, and the difference between two passes and one shared pass. The wait must not
        take longer than it saves.
        """
        rows = self._groups[key].rows
        others = min(rows, limit - rows)
        alone = self._predict(key, rows)
        if not alone:
            return self.window
        saved = alone + self._predict(key, others) - self._predict(key, rows + others)
        return min(self.window, self.OVERHEAD + max(saved, 0.0))

    def _limit(self, key: Hashable) -> int:
        if self._objective is None:
            return self.max_rows
        waiting = self._groups[key].rows
        return self._objective.rows(self.max_rows, waiting, lambda rows: self._predict(key, rows))

    def _part(self, key: Hashable, limit: int, free: int) -> int:
        """Return the rows that one of several free executors takes.

        An equal share, if all rows are done sooner that way; they are where the time of a pass
        grows with its rows. Otherwise as many as fit.
        """
        rows = self._groups[key].rows
        part = math.ceil(rows / free)
        if part >= limit:
            return limit
        alone = min(rows, limit)
        sooner = self._predict(key, part) + self.OVERHEAD < self._predict(key, alone)
        return part if sooner else alone

    def _take(self, key: Hashable, free: int) -> list[WaitingTask[T]]:
        waiting, limit = self._groups[key].waiting, self._limit(key)
        if free > 1 and self._arrivals is not None:
            limit = self._part(key, limit, free)
        count, rows = 1, waiting[0].rows
        while count < len(waiting) and rows + waiting[count].rows <= limit:
            rows += waiting[count].rows
            count += 1
        members = waiting[:count]
        self._keep(key, range(count, len(waiting)))
        return members

    def _keep(self, key: Hashable, places: Sequence[int]) -> None:
        group = self._groups[key]
        self._waiting -= len(group.waiting) - len(places)
        if places:
            self._groups[key] = _Group(
                [group.waiting[place] for place in places],
                [group.ranks[place] for place in places],
            )
        else:
            del self._groups[key]


class BatchKey(NamedTuple):
    """What tasks must have in common to share a forward pass."""

    #: Model version.
    version: int
    #: Input names, each with the dimensions after the rows; empty where those are padded.
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def batch_key(version: int, inputs: Tensors, pad: Sequence[str]) -> BatchKey:
    """Return the key of a task; tasks of equal keys can share a forward pass.

    Args:
      version: model version.
      inputs: the task's arrays by name.
      pad: names of inputs whose free dimensions are padded, so that their sizes may differ.
    """
    shapes = tuple(
        sorted((name, () if name in pad else array.shape[1:]) for name, array in inputs.items())
    )
    return BatchKey(version, shapes)
