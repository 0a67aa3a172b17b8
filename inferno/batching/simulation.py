"""A lane on a virtual clock: clients, the real batch former and executors, without threads.

    client -> front end -> former -> executor -> front end -> client

It predicts within milliseconds how a model behaves with other settings or other arrivals. The same
arrivals give the same report. All times are seconds.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from inferno.batching.former import BatchFormer, Flush, FlushReason, WaitingTask


@dataclass(frozen=True)
class Call:
    """One simulated task."""

    client: int
    #: Time at which its client sent it.
    sent: float


@dataclass(frozen=True)
class Departure:
    """One batch that left."""

    at: float
    reason: FlushReason
    calls: list[Call]
    #: Time that each member waited while an executor was free.
    held: list[float]

    @property
    def size(self) -> int:
        """Number of tasks in the batch."""
        return len(self.calls)


@dataclass(frozen=True)
class Report:
    """Result of a simulation."""

    batches: list[Departure]
    #: For each answered task, time from its client's call to its answer.
    latencies: list[float]
    #: Simulated time.
    duration: float

    @property
    def tasks_per_s(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.duration

    @property
    def mean_size(self) -> float:
        """Mean number of tasks in a batch."""
        return fmean(batch.size for batch in self.batches) if self.batches else 0.0

    @property
    def mean_held(self) -> float:
        """Mean time that a task was held back while an executor was free."""
        return fmean(held for batch in self.batches for held in batch.held)

    @property
    def reasons(self) -> Counter[FlushReason]:
        """Number of batches by the reason why they left."""
        return Counter(batch.reason for batch in self.batches)

    def percentile(self, percent: float) -> float:
        """Return a percentile of the latencies."""
        return float(np.percentile(self.latencies, percent)) if self.latencies else 0.0


@dataclass
class Simulation:
    """Simulates a lane: `call` fills the calendar, `run` works it off."""

    former: BatchFormer[Call]
    #: Returns the time of a batch on an executor, given its number of tasks.
    busy: Callable[[int], float]
    executors: int = 1
    #: Time of the front end for one task, from its answer to its client's next call. The front end
    #: does one at a time, so the inverse is the highest number of tasks per second.
    front_end: float = 0.0
    #: Returns the time of a client from an answer to its next call.
    think: Callable[[], float] = lambda: 0.0
    #: Time between two fetches of a worker; calls in between arrive together.
    fetch: float = 0.0
    #: Whether clients call again after an answer.
    closed_loop: bool = True
    _calendar: list[tuple[float, int, Call]] = field(default_factory=list)
    #: Running batches, as a heap by their end.
    _running: list[tuple[float, int, Flush[Call]]] = field(default_factory=list)
    _free_since: float = 0.0
    _front_end_until: float = 0.0
    _count: int = 0

    def call(self, at: float, client: int) -> None:
        """Schedule a client's call."""
        arrives = (at // self.fetch + 1) * self.fetch if self.fetch else at
        self._count += 1
        heapq.heappush(self._calendar, (arrives, self._count, Call(client, at)))

    def run(self, until: float) -> Report:
        """Simulate until a time; report what happened since the last call of `run`."""
        batches: list[Departure] = []
        latencies: list[float] = []
        begin = now = self._free_since
        while (now := self._next_moment()) <= until:
            while self._running and self._running[0][0] <= now:
                _, _, flush = heapq.heappop(self._running)
                self._finish(flush, now)
                for waiting in flush.members:
                    latencies.append(now - waiting.task.sent)
                    self.former.answered(latencies[-1])
            while self._calendar and self._calendar[0][0] <= now:
                at, _, call = heapq.heappop(self._calendar)
                self.former.add(WaitingTask(call, "all", 1, at, since=at))
            while free := self.executors - len(self._running):
                if (leaving := self.former.flush(now, free=free)) is None:
                    break
                batches.append(self._start(leaving, now))
        return Report(batches, latencies, until - begin)

    def _next_moment(self) -> float:
        moments = [self._calendar[0][0]] if self._calendar else []
        if self._running:
            moments.append(self._running[0][0])
        if len(self._running) < self.executors and (due := self.former.next_due()) is not None:
            moments.append(due)
        return min(moments, default=float("inf"))

    def _start(self, flush: Flush[Call], now: float) -> Departure:
        size = len(flush.members)
        self.former.started(size)
        self._count += 1
        heapq.heappush(self._running, (now + self.busy(size), self._count, flush))
        held = [now - max(w.arrived, self._free_since) for w in flush.members]
        return Departure(now, flush.reason, [w.task for w in flush.members], held)

    def _finish(self, flush: Flush[Call], now: float) -> None:
        self.former.freed(now)
        self.former.finished(len(flush.members), now)
        if len(self._running) == self.executors - 1:
            self._free_since = now
        if self.closed_loop:
            for waiting in flush.members:
                self._front_end_until = max(self._front_end_until, now) + self.front_end
                self.call(self._front_end_until + self.think(), waiting.task.client)


def crowd(size: int, start: float = 0.0, spacing: float = 0.0003) -> Iterator[tuple[float, int]]:
    """Yield the first calls of closed-loop clients, as (time, client)."""
    for client in range(size):
        yield start + client * spacing, client


def poisson(rate: float, until: float, seed: int = 0) -> Iterator[tuple[float, int]]:
    """Yield independent calls, `rate` per second, as (time, client)."""
    source = random.Random(seed)
    at, client = source.expovariate(rate), 0
    while at < until:
        yield at, client
        at, client = at + source.expovariate(rate), client + 1


def recorded(times: Iterable[float]) -> Iterator[tuple[float, int]]:
    """Yield calls at recorded times, shifted so that the first is at 0, as (time, client)."""
    ordered = sorted(times)
    for client, at in enumerate(ordered):
        yield at - ordered[0], client
