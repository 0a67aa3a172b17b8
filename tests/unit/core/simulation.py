"""A lane on a virtual clock: clients, one batch former and one executor, without threads or sleeps.

    client -> former -> executor -> client

The executor needs `SERVICE_S` for a batch and `SERVICE_PER_ROW_S` more for each row. Answers are
delivered one after the other, `SPACING_S` apart, and a closed-loop client calls again at once.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean

from inferno.batching import BatchFormer, Flush, FlushReason, Waiting

SERVICE_S = 0.005
SERVICE_PER_ROW_S = 0.00005
SPACING_S = 0.0003


@dataclass(frozen=True)
class Left:
    """One batch that left."""

    at: float
    reason: FlushReason
    size: int
    #: How long each member had waited while the executor was free, in seconds.
    held: list[float]
    clients: list[int]


@dataclass
class Lane:
    """The simulation; `arrive` fills the calendar, `run` works it off."""

    former: BatchFormer[int]
    #: How long it takes from a result's turn to be delivered until its client's next call arrives.
    think: Callable[[], float] = lambda: 0.0
    #: Time between two fetches of a consumer: calls in between arrive together.
    fetch_s: float = 0.0
    closed_loop: bool = True
    batches: list[Left] = field(default_factory=list)
    _calendar: list[tuple[float, int, int]] = field(default_factory=list)
    _busy_until: float = 0.0
    _free_since: float = 0.0
    _running: Flush[int] | None = None
    _count: int = 0

    def arrive(self, at: float, client: int) -> None:
        """Let a call of a client arrive."""
        if self.fetch_s:
            at = (at // self.fetch_s + 1) * self.fetch_s
        self._count += 1
        heapq.heappush(self._calendar, (at, self._count, client))

    def run(self, until: float) -> list[Left]:
        """Work off what happens until then; return the batches that left since the last call."""
        already = len(self.batches)
        while (now := self._next_moment()) <= until:
            if self._running is not None and self._busy_until <= now:
                self._finish(self._running)
            while self._calendar and self._calendar[0][0] <= now:
                at, _, client = heapq.heappop(self._calendar)
                self.former.add(Waiting(client, "all", 1, at))
            if self._running is None and (flush := self.former.flush(now)) is not None:
                self._start(flush, now)
        return self.batches[already:]

    def _next_moment(self) -> float:
        moments = [self._calendar[0][0]] if self._calendar else []
        if self._running is not None:
            moments.append(self._busy_until)
        elif (due := self.former.next_due()) is not None:
            moments.append(due)
        return min(moments, default=float("inf"))

    def _start(self, flush: Flush[int], now: float) -> None:
        held = [now - max(w.arrived, self._free_since) for w in flush.members]
        clients = [w.task for w in flush.members]
        self.batches.append(Left(now, flush.reason, len(clients), held, clients))
        self.former.started()
        self._running = flush
        self._busy_until = now + SERVICE_S + SERVICE_PER_ROW_S * len(clients)

    def _finish(self, flush: Flush[int]) -> None:
        self.former.finished()
        self._running = None
        self._free_since = self._busy_until
        if self.closed_loop:
            for turn, waiting in enumerate(flush.members, start=1):
                self.arrive(self._busy_until + turn * SPACING_S + self.think(), waiting.task)


def crowd(size: int, start: float = 0.0) -> Iterator[tuple[float, int]]:
    """Yield the first arrivals of closed-loop clients."""
    for client in range(size):
        yield start + client * SPACING_S, client


def poisson(rate: float, until: float, seed: int) -> Iterator[tuple[float, int]]:
    """Yield arrivals of an open loop, `rate` per second."""
    source = random.Random(seed)
    at, client = source.expovariate(rate), 0
    while at < until:
        yield at, client
        at, client = at + source.expovariate(rate), client + 1


def mean_size(batches: list[Left]) -> float:
    """Return the mean number of tasks in a batch."""
    return fmean(batch.size for batch in batches)


def mean_held(batches: list[Left]) -> float:
    """Return the mean time that tasks were held back while the executor was free, in seconds."""
    return fmean(held for batch in batches for held in batch.held)
