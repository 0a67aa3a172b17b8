"""The batch former: which waiting tasks leave together, and when.

It holds no clock, no thread and no queue: the consumer tells it what arrived and what the time is,
and asks what should leave. So its decisions can be tested on a virtual clock. All times are seconds
of one monotonic clock.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

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
    #: A task would otherwise not be answered before its deadline.
    DEADLINE = "deadline"
    #: A part of a batch that failed, run again to find the guilty member.
    ISOLATED = "isolated"


class Waiting(msgspec.Struct, Generic[T], frozen=True, gc=False):
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


@dataclass(frozen=True)
class Flush(Generic[T]):
    """A batch that should leave now."""

    reason: FlushReason
    members: list[Waiting[T]]


class _Bucket(Generic[T]):
    """Waiting tasks in the order in which they leave, and what is asked of them all the time."""

    def __init__(self, waiting: list[Waiting[T]], ranks: list[tuple[int, float]]) -> None:
        self.waiting = waiting
        #: Of each, its place in the line: lower leaves sooner.
        self.ranks = ranks
        self.rows = sum(w.rows for w in waiting)
        #: When the task arrived that has waited here for the longest.
        self.oldest = min((w.arrived for w in waiting), default=math.inf)
        #: The earliest deadline.
        self.deadline = min((w.deadline for w in waiting if w.deadline is not None), default=None)

    def add(self, waiting: Waiting[T]) -> None:
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


class Crowd:
    """Whether others will join those that wait, judged from who came lately.

    Nobody is expected when everyone is here: as many tasks as were in the lane at once during the
    last batches. Clients that call again after their answer cannot be more. Nobody is expected,
    either, when nobody has come for much longer than between the last arrivals. But a crowd that
    has come fast enough to fill the batch within the window is expected to go on, whatever the
    pauses: its calls come in bursts, when the answers of a batch have been delivered.
    """

    #: Weight of the newest gap: about the last ten arrivals matter.
    WEIGHT = 0.2
    #: A silence of so many mean gaps means that a burst is over: of exponential gaps, 98 % are
    #: shorter.
    SILENCE = 4.0
    #: No silence is shorter than this, in seconds: fetching and reading messages takes as long.
    PAUSE = 0.001
    #: So many batches are remembered.
    BATCHES = 8

    def __init__(self, window: float) -> None:
        """Begin without evidence, as if nobody else came."""
        self._window = window
        #: Exponentially weighted mean of the gaps between arrivals, in seconds. The first arrival
        #: after a pause says nothing of how fast others follow. When a task was answered before
        #: the next one came, nobody joins (a lone client calls again only after its answer), so
        #: the mean begins anew.
        self._gap = window
        self._last = 0.0
        #: Arrivals since the lane was empty.
        self._together = 0
        #: When each of the last batches left, and how many tasks had arrived until then.
        self._left: deque[tuple[float, int]] = deque(maxlen=self.BATCHES)
        self._arrived = 0
        #: Most tasks in the lane at once, by batch, the present one last; and of them all.
        self._most: deque[int] = deque([0], maxlen=self.BATCHES)
        self._peak = 0

    def arrived(self, now: float, in_lane: int) -> None:
        """Take note of an arrival, with which so many tasks are waiting or running."""
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
        """Take note that tasks were answered: their clients may call again soon."""
        self._last = now

    def left(self, now: float) -> None:
        """Take note that a batch has left."""
        self._left.append((now, self._arrived))
        self._most.append(0)
        self._peak = max(self._most)

    def expected_until(self, in_lane: int, seats: int, until: float, window: float) -> float:
        """Return until when another arrival is worth waiting for; it may be over.

        Args:
          in_lane: tasks that wait or run.
          seats: rows that the batch can still take.
          until: the end of its window.
          window: how long that is, in seconds.
        """
        if in_lane >= self._peak:
            return self._last
        since, before = self._left[0] if self._left else (self._last, self._arrived)
        if (self._arrived - before) * (until - self._last) >= seats * (self._last - since) > 0:
            return until
        silence = self.SILENCE * self._gap
        if silence >= window:
            return self._last  # The window would end before it is known that nobody else comes.
        return self._last + max(silence, self.PAUSE)


class Objective:
    """What 95 of 100 tasks shall take at most, from acceptance to answer.

    A batch may wait for as long as leaves time for its pass and for everything else: the way to
    the worker, the queue, settling. That remainder is learned from the tasks that were answered:
    one that took too long adds 19 times as much to it as one in time takes away, so that it
    settles where one of 20 is late.
    """

    #: Change of the remainder by one late task, as a part of the objective.
    STEP = 0.02

    def __init__(self, p95: float) -> None:
        """Take the objective, in seconds."""
        self.p95 = p95
        self._remainder = 0.0

    def answered(self, latency: float) -> None:
        """Take note that a task was answered so many seconds after it was accepted."""
        step = self.STEP * self.p95 * (0.95 if latency > self.p95 else -0.05)
        self._remainder = min(max(self._remainder + step, 0.0), self.p95)

    def window(self, run: float) -> float:
        """Return how long a task may wait in the worker for a pass of so many seconds."""
        return max(self.p95 - self._remainder - run, 0.0)

    def rows(self, most: int, waiting: int, predict: Callable[[int], float]) -> int:
        """Return the rows of the largest batch that suits the objective.

        A task that has just missed a batch waits for its pass and then has one of its own, so two
        passes have to fit. Where that many rows at a time leave others behind, whole batches get
        more done.
        """
        suits = most
        while suits > 1 and 2 * predict(suits) > self.p95:
            suits //= 2
        return suits if waiting < 2 * suits else most


class BatchFormer(Generic[T]):
    """Collects waiting tasks of one lane and says when a batch leaves.

    A batch leaves when an executor is free and it is full, or its oldest task's window is over, or
    a deadline would be missed, or nobody else is expected, or waiting longer would cost more than
    it can save. While every executor is busy, arrivals gather for nothing.
    """

    #: How much longer before a deadline than its pass takes a batch leaves, in seconds, so that it
    #: is answered in time.
    DEADLINE_MARGIN = 0.005
    #: What a batch costs besides its pass, in seconds: fetching, beginning and settling it, in the
    #: worker and in Redis.
    OVERHEAD = 0.002

    def __init__(
        self,
        max_rows: int,
        window: float,
        adaptive: bool = True,
        predict: Callable[[Any, int], float] = lambda bucket, rows: 0.0,
        objective: float | None = None,
    ) -> None:
        """Set the policy.

        Args:
          max_rows: rows of one forward pass, at most.
          window: how long the oldest waiting task may be held back while an executor is free, in
            seconds.
          adaptive: end the window early when nobody else is expected, or it is not worth waiting.
          predict: returns how many seconds a forward pass will probably take, by its bucket and
            rows.
          objective: what 95 of 100 tasks shall take at most, in seconds; it replaces the window,
            and may make batches smaller.
        """
        self.max_rows = max_rows
        self.window = window if objective is None else objective
        self._objective = None if objective is None else Objective(objective)
        self._crowd = Crowd(self.window) if adaptive else None
        self._predict = predict
        self._buckets: dict[Hashable, _Bucket[T]] = {}
        self._waiting = 0
        self._running = 0
        self._free_since = -math.inf

    def __len__(self) -> int:
        return self._waiting

    def add(self, waiting: Waiting[T]) -> None:
        """Take in a task that arrived."""
        bucket = self._buckets.get(waiting.bucket)
        if bucket is None:
            bucket = self._buckets[waiting.bucket] = _Bucket([], [])
        bucket.add(waiting)
        self._waiting += 1
        if self._crowd is not None:
            self._crowd.arrived(waiting.arrived, self._waiting + self._running)

    def started(self, tasks: int) -> None:
        """Take note that a flushed batch of so many tasks occupies an executor."""
        self._running += tasks

    def freed(self, now: float) -> None:
        """Take note that its forward pass is over, and an executor is free."""
        self._free_since = now

    def finished(self, tasks: int, now: float) -> None:
        """Take note that its tasks are answered."""
        self._running -= tasks
        if self._crowd is not None:
            self._crowd.answered(now)

    def answered(self, latency: float) -> None:
        """Take note that a task was answered so many seconds after it was accepted."""
        if self._objective is not None:
            self._objective.answered(latency)

    def flush(self, now: float, *, free: int = 1) -> Flush[T] | None:
        """Return the batch that should leave now, if any.

        Args:
          now: the time.
          free: executors that are; with none, only a full batch leaves. Several may share what one
            could take.
        """
        ready = [
            (due, key)
            for key in self._buckets
            if (due := self._due(key))[0] <= now and (free or due[1] is FlushReason.FULL)
        ]
        if not ready:
            return None
        # Of several that are ready, the one whose first task comes first.
        (_, reason), key = min(ready, key=lambda item: self._buckets[item[1]].ranks[0])
        if self._crowd is not None:
            self._crowd.left(now)
        return Flush(reason, self._take(key, free))

    def next_reason(self, now: float) -> FlushReason | None:
        """Say why a batch should leave now, or None when none should."""
        ready = [reason for due, reason in map(self._due, self._buckets) if due <= now]
        return None if not ready else min(ready, key=lambda reason: reason is not FlushReason.FULL)

    def next_due(self) -> float | None:
        """Return when a batch will leave if nothing else arrives, or None when nothing waits."""
        return min((self._due(key)[0] for key in self._buckets), default=None)

    def next_deadline(self) -> float | None:
        """Return the earliest deadline of a waiting task, or None when none has one."""
        deadlines = [b.deadline for b in self._buckets.values() if b.deadline is not None]
        return min(deadlines, default=None)

    def drop(self, condition: Callable[[Waiting[T]], bool]) -> list[Waiting[T]]:
        """Remove and return the waiting tasks for which the condition holds."""
        dropped: list[Waiting[T]] = []
        for key, bucket in list(self._buckets.items()):
            gone = {place for place, w in enumerate(bucket.waiting) if condition(w)}
            if gone:
                dropped += (bucket.waiting[place] for place in sorted(gone))
                self._keep(key, [n for n in range(len(bucket.waiting)) if n not in gone])
        return dropped

    def clear(self) -> None:
        """Forget every waiting task: the broker will hand them over again."""
        self._buckets.clear()
        self._waiting = 0

    def _due(self, key: Hashable) -> tuple[float, FlushReason]:
        bucket = self._buckets[key]
        limit = self._limit(key)
        if bucket.rows >= limit:
            return bucket.oldest, FlushReason.FULL
        if self._objective is None:
            window = self.window if self._crowd is None else self._worthwhile(key, limit)
            due = max(bucket.oldest, self._free_since) + window
        else:
            window = self._objective.window(self._predict(key, bucket.rows))
            due = bucket.oldest + window
        reason = FlushReason.WINDOW
        if self._crowd is not None:
            in_lane, seats = self._waiting + self._running, limit - bucket.rows
            until = self._crowd.expected_until(in_lane, seats, due, window)
            if until < due:
                due, reason = until, FlushReason.IDLE
        if bucket.deadline is not None:
            latest = bucket.deadline - self._predict(key, bucket.rows) - self.DEADLINE_MARGIN
            if latest < due:
                due, reason = latest, FlushReason.DEADLINE
        return due, reason

    def _worthwhile(self, key: Hashable, limit: int) -> float:
        """Return for how long an executor may be kept free for more rows, in seconds.

        Waiting for as many rows again, or as many as one pass still takes, saves one batch: its
        overhead, and as much as one pass of all takes less than two. What the executor could have
        done meanwhile must not be more.
        """
        rows = self._buckets[key].rows
        others = min(rows, limit - rows)
        alone = self._predict(key, rows)
        if not alone:
            return self.window
        saved = alone + self._predict(key, others) - self._predict(key, rows + others)
        return min(self.window, self.OVERHEAD + max(saved, 0.0))

    def _limit(self, key: Hashable) -> int:
        if self._objective is None:
            return self.max_rows
        waiting = self._buckets[key].rows
        return self._objective.rows(self.max_rows, waiting, lambda rows: self._predict(key, rows))

    def _part(self, key: Hashable, limit: int, free: int) -> int:
        """Return the rows that one of several executors takes: fewer if all are done sooner then.

        They are where passes take their time by the row. What all take together is as much.
        """
        rows = self._buckets[key].rows
        part = math.ceil(rows / free)
        if part >= limit:
            return limit
        alone = min(rows, limit)
        sooner = self._predict(key, part) + self.OVERHEAD < self._predict(key, alone)
        return part if sooner else alone

    def _take(self, key: Hashable, free: int) -> list[Waiting[T]]:
        waiting, limit = self._buckets[key].waiting, self._limit(key)
        if free > 1 and self._crowd is not None:
            limit = self._part(key, limit, free)
        count, rows = 1, waiting[0].rows
        while count < len(waiting) and rows + waiting[count].rows <= limit:
            rows += waiting[count].rows
            count += 1
        members = waiting[:count]
        self._keep(key, range(count, len(waiting)))
        return members

    def _keep(self, key: Hashable, places: Sequence[int]) -> None:
        bucket = self._buckets[key]
        self._waiting -= len(bucket.waiting) - len(places)
        if places:
            self._buckets[key] = _Bucket(
                [bucket.waiting[place] for place in places],
                [bucket.ranks[place] for place in places],
            )
        else:
            del self._buckets[key]


class Bucket(NamedTuple):
    """What tasks have in common that can share a forward pass."""

    #: Of the model.
    version: int
    #: Names of the inputs, with what follows the rows where it is not padded.
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def bucket(version: int, inputs: Tensors, pad: Sequence[str]) -> Bucket:
    """Say which tasks can share a forward pass: those whose buckets are equal.

    Args:
      version: of the model.
      inputs: the task's arrays by name.
      pad: names of inputs whose free dimensions are padded, so that their sizes may differ.
    """
    shapes = tuple(
        sorted((name, () if name in pad else array.shape[1:]) for name, array in inputs.items())
    )
    return Bucket(version, shapes)


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
