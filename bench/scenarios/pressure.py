"""Can you follow the system under pressure?

A copy of `mock` that answers about 80 tasks a second gets more and more calls, up to twice as many,
and then few again. Each call can wait for a second (`timeout_ms`). Meanwhile `GET /lanes` is read
ten times a second.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.scenarios.packages import add_mock
from inferno.testing.platform import running_platform

QUESTION = "Can you follow the system under pressure?"

MODEL = "slow"
#: A pass of 8 tasks takes 100 ms.
PARAMETERS = {"latency_ms": 60.0, "latency_per_row_ms": 5.0}
BATCHING = {"max_batch_size": 8}
CAPACITY_PER_S = 80.0
TIMEOUT_MS = 1000
#: Rates at the start and end, and at the peak, in calls a second.
LOW_PER_S, HIGH_PER_S = 20.0, 160.0
#: Lengths of the low rate, the rise, the high rate and the final low rate, in seconds.
PHASES_S = (4.0, 8.0, 6.0, 8.0)
#: Interval between two looks at the lane, in seconds.
LOOK_S = 0.1
#: Connections that calls use in turn; each carries one call at a time.
CLIENTS = 32
PATIENCE_S = 30.0


def measure(folder: Path, phases_s: tuple[float, float, float, float] = PHASES_S) -> dict[str, Any]:
    """Overload the platform, and watch it.

    Args:
      folder: empty folder for the platform's files.
      phases_s: lengths of the phases, see `PHASES_S`.
    Returns:
      `calls`, each with `at_s`, `status`, `latency_ms` and the `retry_after_s` of a refusal;
      `looks`, each with `at_s`, `waiting` and `held`.
    """
    add_mock(folder / "models", MODEL, parameters=PARAMETERS, batching=BATCHING)
    env = {"INFERNO_REPOSITORY__ROOT": str(folder / "models")}
    with running_platform(folder, env, "--no-flower") as platform:
        calls, looks = asyncio.run(_press(platform.url, phases_s))
    return {
        "capacity_per_s": CAPACITY_PER_S,
        "timeout_ms": TIMEOUT_MS,
        "max_batch_size": BATCHING["max_batch_size"],
        "phases_s": phases_s,
        "calls": sorted(calls, key=lambda call: float(call["at_s"])),
        "looks": looks,
    }


def rate_per_s(at_s: float, phases_s: tuple[float, float, float, float]) -> float:
    """Return the rate of calls at a time, in calls a second."""
    before, rise, high, _ = phases_s
    if at_s < before or at_s >= before + rise + high:
        return LOW_PER_S
    return LOW_PER_S + (HIGH_PER_S - LOW_PER_S) * min((at_s - before) / rise, 1.0)


#: The front end closes connections that idle for 5 s, as httpx does by default. A client must be
#: the first to do so, or it sends a call on a connection that is being closed.
_LIMITS = httpx.Limits(keepalive_expiry=2.0)


async def _press(
    url: str, phases_s: tuple[float, float, float, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    # One TLS context for all: creating one takes longer than a call.
    tls = ssl.create_default_context()
    clients = [
        httpx.AsyncClient(base_url=url, verify=tls, timeout=PATIENCE_S, limits=_LIMITS)
        for _ in range(CLIENTS)
    ]
    turns = cycle(clients)
    draws = random.Random(0)
    looks: list[dict[str, Any]] = []
    began = time.perf_counter()
    looking = asyncio.create_task(_look(url, tls, began, looks))
    calls = []
    at_s = 0.0
    while at_s < sum(phases_s):
        await asyncio.sleep(max(began + at_s - time.perf_counter(), 0))
        calls.append(asyncio.create_task(_call(next(turns), at_s, began)))
        at_s += draws.expovariate(rate_per_s(at_s, phases_s))
    answered = [await call for call in calls]
    looking.cancel()
    for client in clients:
        await client.aclose()
    return answered, looks


async def _call(client: httpx.AsyncClient, at_s: float, began: float) -> dict[str, Any]:
    answer = await client.post(
        f"/v1/models/{MODEL}:predict",
        json={"inputs": {"text": f"{at_s}"}, "timeout_ms": TIMEOUT_MS},
    )
    call = {
        "at_s": round(at_s, 3),
        "status": answer.status_code,
        "latency_ms": round((time.perf_counter() - began - at_s) * 1e3, 1),
    }
    if answer.status_code == 429:
        call["retry_after_s"] = int(answer.headers["Retry-After"])
    return call


async def _look(url: str, tls: ssl.SSLContext, began: float, looks: list[dict[str, Any]]) -> None:
    async with httpx.AsyncClient(base_url=url, verify=tls, timeout=PATIENCE_S) as client:
        while True:
            lane = (await client.get(f"/lanes/{MODEL}")).json()
            at_s = round(time.perf_counter() - began, 3)
            looks.append({"at_s": at_s, "waiting": lane["waiting"], "held": lane["held"]})
            await asyncio.sleep(LOOK_S)


def recovered_s(document: dict[str, Any]) -> float | None:
    """Return how long after the peak the lane was empty; None if it never was."""
    over_s = sum(document["phases_s"][:3])
    for look in document["looks"]:
        if look["at_s"] >= over_s and look["waiting"] == 0:
            waited_s: float = look["at_s"] - over_s
            return waited_s
    return None


def answer(document: dict[str, Any]) -> list[str]:
    """Summarise what the overload did, and when the platform recovered."""
    calls, looks, recovered = document["calls"], document["looks"], recovered_s(document)
    count = Counter(call["status"] for call in calls)
    latency_ms = np.percentile([call["latency_ms"] for call in calls if call["status"] == 200], 99)
    hints_s = [call["retry_after_s"] for call in calls if call["status"] == 429]
    hint = f", Retry-After up to {max(hints_s)} s" if hints_s else ""
    others = len(calls) - count[200] - count[429] - count[504]
    after = "did not become empty" if recovered is None else f"was empty {recovered:.1f} s later"
    return [
        f"Late calls are refused at once; the rest is answered within {latency_ms / 1e3:.1f} s.",
        f"{count[200]} of {len(calls)} calls were answered, 99 of a hundred of them within "
        f"{latency_ms / 1e3:.2f} s; {count[429]} were refused at once (429{hint}), {count[504]} "
        f"were accepted but did not start in time (504), {others} ended otherwise.",
        f"At most {max(look['waiting'] for look in looks)} tasks waited in the lane; after the "
        f"pressure it {after}.",
    ]
