"""The cost of a task while few or many others wait.

The lane is paused, filled through the API and resumed. The time until it is empty counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import islice

from bench import processes
from bench.client import Http, post
from bench.results import Measurement, Place
from bench.targets import Broken, Service

#: Clients that fill the lane at the same time.
_CONNECTIONS = 64
#: A short backlog drains too fast to time, so the drain is repeated until this many tasks passed.
_ENOUGH = 2000
#: Limit of one drain, in seconds, and its increase for each task.
_PATIENCE_S, _PATIENCE_PER_TASK_S = 30.0, 0.1
#: Interval between two looks at the lane, in seconds.
_LOOK_S = 0.002


def measure(service: Service, waiting: int, place: Place, texts: Iterator[str]) -> Measurement:
    """Fill the lane and drain it.

    Args:
      service: Inferno.
      waiting: tasks in the lane when it is resumed.
      place: target, workload and repeat.
      texts: different texts, one for each task.
    Returns:
      A measurement whose rate is that of the drain.
    Raises:
      Broken: a submit was refused, or the lane does not become empty.
    """
    rounds = max(1, _ENOUGH // waiting)
    drain_s = fill_s = 0.0
    used: list[dict[str, float]] = []
    for _ in range(rounds):
        _lane(service, "POST", "/pause")
        began = time.perf_counter()
        asyncio.run(_fill(service, list(islice(texts, waiting))))
        fill_s += time.perf_counter() - began
        found = _lane(service, "GET")["waiting"]
        if found != waiting:
            raise Broken(f"{found} tasks wait, expected {waiting}")
        before = processes.snapshot()
        began = time.perf_counter()
        _lane(service, "POST", "/resume")
        _await_empty(service, began + _PATIENCE_S + _PATIENCE_PER_TASK_S * waiting)
        drain_s += time.perf_counter() - began
        used.append(processes.cpu_s(before, processes.snapshot()))
    kinds = dict.fromkeys(kind for cpu in used for kind in cpu)
    return Measurement(
        **place,
        scenario=f"drain of {waiting} waiting",
        seconds=drain_s,
        answered=waiting * rounds,
        cpu_s={kind: sum(cpu.get(kind, 0.0) for cpu in used) for kind in kinds},
        rss_bytes=processes.rss_bytes(processes.snapshot()),
        values={"submits_per_s": waiting * rounds / fill_s},
    )


async def _fill(service: Service, texts: list[str]) -> None:
    left = iter(texts)

    async def submit() -> None:
        connection = await Http.connect(service.port)
        try:
            for text in left:
                status, body = await connection.call(post("/infer", service.submit([text])))
                if status != 202:
                    raise Broken(f"a submit was answered with {status}: {body[:200]!r}")
        finally:
            connection.close()

    await asyncio.gather(*(submit() for _ in range(min(_CONNECTIONS, len(texts)))))


def _await_empty(service: Service, deadline: float) -> None:
    while True:
        lane = _lane(service, "GET")
        if lane["waiting"] + lane["held"] + lane["delayed"] == 0:
            return
        if time.perf_counter() > deadline:
            raise Broken(f"the lane does not become empty: {lane}")
        time.sleep(_LOOK_S)


def _lane(service: Service, method: str, action: str = "") -> dict[str, int]:
    status, lane = service.call(method, f"/lanes/{service.model}{action}")
    if status != 200:
        raise Broken(f"GET or POST /lanes was answered with {status}: {lane}")
    found: dict[str, int] = lane
    return found
