"""Load from this process: closed loops, and open loops at a given rate.

A closed loop has a number of clients, each of which calls again as soon as it is answered; it finds
the capacity. An open loop calls at times that were drawn before, whatever the server does. Its
latencies count from these times, so a stalled server pays for every call that was due meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from bench.client import Http, ProtocolError, WebSocket, get, post
from bench.targets import Service
from bench.workloads import MARK

#: Limit of one call, in seconds; a longer one is an error.
PATIENCE_S = 10.0
#: Connections of an open loop. A call waits for a free one, and its latency includes the wait.
OPEN_CONNECTIONS = 256
#: Part of an answer of Inferno that is a kept result.
CACHED = b'"cached":true'


class Way(StrEnum):
    """How a client calls."""

    #: One synchronous HTTP call.
    HTTP = "http"
    #: One message on a WebSocket, with its result on the same socket.
    WEBSOCKET = "websocket"
    #: One call that submits, and one that waits for the result.
    POLL = "poll"


@dataclass
class Load:
    """The results of one loop."""

    seconds: float
    answered: int
    #: p50, p90, p95, p99 and max; empty when nothing was answered.
    latency_ms: dict[str, float]
    #: Number of errors by kind.
    errors: dict[str, int]
    #: Mean number of requests in a forward pass; None if answers do not tell.
    mean_batch: float | None
    #: First error, as text.
    sample: str | None
    #: Processor time of the generator, in seconds.
    cpu_s: float = 0.0
    #: Answers that are kept results.
    cached: int = 0
    #: Delay between due and sent, 99th percentile in ms; None for closed loops.
    late_ms: float | None = None


#: Sends texts and returns the body of the answer.
Call = Callable[[list[str]], Awaitable[bytes]]


class Refused(Exception):
    """An answer that is not a success, or belongs to another request."""


@dataclass
class _Tally:
    service: Service
    latencies_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    passes: float = 0.0
    sized: int = 0
    cached: int = 0
    sample: str | None = None

    async def ask(self, call: Call, texts: list[str], since: float) -> bool:
        """Call once; return whether the connection can be used again."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                body = await call(texts)
            if self.service.echoes:
                _match(body, texts)
        except Refused as exc:
            self._fail("refused", exc)
            return True
        except TimeoutError as exc:
            self._fail("timeout", exc)
            return False
        except (OSError, ProtocolError) as exc:
            self._fail("connection", exc)
            return False
        self.latencies_s.append(time.perf_counter() - since)
        self.cached += CACHED in body
        size = self.service.batch_size(body)
        if size:
            self.sized += 1
            self.passes += 1 / size
        return True

    def _fail(self, kind: str, exc: Exception) -> None:
        self.errors[kind] += 1
        if self.sample is None:
            self.sample = f"{kind}: {exc}"[:200]

    def load(self, seconds: float, cpu_s: float) -> Load:
        late_ms = percentile(sorted(self.late_s), 99) * 1000 if self.late_s else None
        return Load(
            seconds=seconds,
            answered=len(self.latencies_s),
            latency_ms=latency_ms(self.latencies_s),
            errors=dict(self.errors),
            mean_batch=self.sized / self.passes if self.passes else None,
            sample=self.sample,
            cpu_s=cpu_s,
            cached=self.cached,
            late_ms=late_ms,
        )


_NUMBER = re.compile(rb"#(\d+)")


def _match(body: bytes, texts: list[str]) -> None:
    """Check that an answer has the texts of its request.

    Raises:
      Refused: it has other texts.
    """
    wanted = texts[-1].partition(MARK)[2].encode()
    found: list[bytes] = _NUMBER.findall(body)
    if len(found) != len(texts) or found[-1] != wanted:
        raise Refused(f"not the answer to this request: {body[:150]!r}")


def closed_loop(
    service: Service,
    way: Way,
    *,
    connections: int,
    rows: int,
    seconds: float,
    texts: Iterator[str],
) -> Load:
    """Keep clients busy.

    Args:
      service: service to call.
      way: how clients call it.
      connections: clients, each with one request under way.
      rows: texts in one request.
      seconds: how long clients start calls.
      texts: texts to send; different ones, unless kept results should answer.
    """

    async def run() -> Load:
        tally = _Tally(service)
        async with _clients(service, way, connections) as calls:
            began, cpu = time.perf_counter(), time.process_time()
            end = began + seconds

            async def keep_asking(call: Call) -> None:
                while (now := time.perf_counter()) < end:
                    if not await tally.ask(call, list(islice(texts, rows)), now):
                        return

            await asyncio.gather(*map(keep_asking, calls))
            # The last answers arrive after the end.
            return tally.load(time.perf_counter() - began, time.process_time() - cpu)

    return asyncio.run(run())


def open_loop(
    service: Service, *, rate: float, seconds: float, texts: Iterator[str], seed: int = 0
) -> Load:
    """Call over HTTP at random times, as many independent users do.

    Args:
      service: service to call.
      rate: mean number of requests a second.
      seconds: how long requests are sent.
      texts: different texts.
      seed: seed of the times.
    """

    async def run() -> Load:
        tally = _Tally(service)
        due: asyncio.Queue[float | None] = asyncio.Queue()

        async def serve(call: Call) -> None:
            while (at := await due.get()) is not None:
                if not await tally.ask(call, [next(texts)], at):
                    return

        connections = min(OPEN_CONNECTIONS, max(1, math.ceil(rate)))
        async with _clients(service, Way.HTTP, connections) as calls:
            began, cpu = time.perf_counter(), time.process_time()
            serving = [asyncio.create_task(serve(call)) for call in calls]
            for at in arrivals(rate, seconds, seed):
                wait_s = began + at - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                tally.late_s.append(time.perf_counter() - began - at)
                due.put_nowait(began + at)
            for _ in calls:
                due.put_nowait(None)
            _, stuck = await asyncio.wait(serving, timeout=PATIENCE_S)
            for task in stuck:
                task.cancel()
            unsent = sum(due.get_nowait() is not None for _ in range(due.qsize()))
            if unsent:
                tally.errors["unsent"] += unsent
            if stuck:
                tally.errors["unanswered"] += len(stuck)
            return tally.load(time.perf_counter() - began, time.process_time() - cpu)

    return asyncio.run(run())


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Yield the times of a Poisson process, in seconds from its start."""
    chance = random.Random(seed)
    at = chance.expovariate(rate)
    while at < seconds:
        yield at
        at += chance.expovariate(rate)


@asynccontextmanager
async def _clients(service: Service, way: Way, number: int) -> AsyncIterator[list[Call]]:
    """Connect clients, and disconnect them at the end."""
    connect = {Way.HTTP: _by_http, Way.POLL: _by_polling, Way.WEBSOCKET: _by_websocket}[way]
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connect(service)) for _ in range(number)]


@asynccontextmanager
async def _by_http(service: Service) -> AsyncIterator[Call]:
    connection = await Http.connect(service.port)

    async def call(texts: list[str]) -> bytes:
        status, body = await connection.call(post(service.path, service.body(texts)))
        if status != 200:
            raise Refused(f"{status} {body[:150]!r}")
        return body

    try:
        yield call
    finally:
        connection.close()


_TASK_ID = re.compile(rb'"task_id":"([^"]+)"')


@asynccontextmanager
async def _by_polling(service: Service) -> AsyncIterator[Call]:
    connection = await Http.connect(service.port)

    async def call(texts: list[str]) -> bytes:
        status, body = await connection.call(post("/infer", service.submit(texts)))
        found = _TASK_ID.search(body)
        if status != 202 or found is None:
            raise Refused(f"{status} {body[:150]!r}")
        path = f"/tasks/{found[1].decode()}?wait={PATIENCE_S:.0f}"
        status, body = await connection.call(get(path))
        if status != 200 or b'"status":"succeeded"' not in body:
            raise Refused(f"{status} {body[:150]!r}")
        return body

    try:
        yield call
    finally:
        connection.close()


@asynccontextmanager
async def _by_websocket(service: Service) -> AsyncIterator[Call]:
    socket = await WebSocket.connect(service.port, "/ws")

    async def call(texts: list[str]) -> bytes:
        socket.send(service.submit(texts, b'"type":"submit",'))
        while (message := await socket.receive()).startswith(b'{"type":"accepted"'):
            pass
        if not message.startswith(b'{"type":"result"'):
            raise Refused(f"{message[:150]!r}")
        return message

    try:
        yield call
    finally:
        socket.close()


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile by the nearest rank.

    Args:
      ordered: values in ascending order; at least one.
      percent: over 0, up to 100.
    """
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def latency_ms(latencies_s: Sequence[float]) -> dict[str, float]:
    """Return p50, p90, p95, p99 and max in milliseconds; empty without values."""
    if not latencies_s:
        return {}
    ordered = sorted(latencies_s)
    found = {f"p{percent}": percentile(ordered, percent) for percent in (50, 90, 95, 99)}
    return {name: value * 1000 for name, value in {**found, "max": ordered[-1]}.items()}
