"""What a hot swap costs concurrent callers.

Two versions with the weights of one model take turns. Each is loaded and warmed up in the worker
that serves the other; then it takes over, and the other is unloaded. Meanwhile calls arrive at
random, at a fixed rate.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import ssl
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from inferno.testing.platform import running
from inferno.testing.processes import ROOT

MODEL = "swapped"
#: Connections that calls use in turn; each carries one call at a time.
CLIENTS = 32
PATIENCE_S = 60.0


def measure(
    folder: Path, model: str, *, swaps: int, rate_per_s: float, before_s: float
) -> dict[str, Any]:
    """Swap versions under load.

    Args:
      folder: empty folder for the platform's files.
      model: default model whose version 1 is served as two; called with its warm-up sample.
      swaps: number of swaps; each loads, warms up, switches, and unloads the other version.
      rate_per_s: calls a second.
      before_s: how long calls arrive before the first swap, in seconds.
    Returns:
      `calls`, each with the times at which it was due and sent (`at_s`, `sent_s`), its `status`,
      `version` and `latency_ms`; `loads`, each with the requested `version`, and the times at which
      it was sent and answered (`from_s`, `until_s`).
    """
    source = ROOT / "models" / model
    for version in (1, 2):
        package = folder / "models" / MODEL / str(version)
        shutil.copytree(source / "1", package)
        manifest = yaml.safe_load((package / "model.yaml").read_text())
        manifest |= {"name": MODEL, "version": version}
        (package / "model.yaml").write_text(yaml.safe_dump(manifest))
    for code in source.glob("*.py"):
        shutil.copy(code, folder / "models" / MODEL)
    inputs = manifest["warm_up"]["inputs"]
    env = {
        "INFERNO_REPOSITORY__ROOT": str(folder / "models"),
        "INFERNO_REPOSITORY__PRELOAD": "active",
    }
    with running(folder, env, "--no-flower") as platform:
        calls, loads = asyncio.run(_swap(platform.url, inputs, swaps, rate_per_s, before_s))
    return {"rate_per_s": rate_per_s, "calls": calls, "loads": loads}


async def _swap(
    url: str, inputs: dict[str, Any], swaps: int, rate_per_s: float, before_s: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    tls = ssl.create_default_context()
    clients = [
        httpx.AsyncClient(base_url=url, verify=tls, timeout=PATIENCE_S) for _ in range(CLIENTS)
    ]
    turns = cycle(clients)
    calls: list[asyncio.Task[dict[str, Any]]] = []
    loads: list[dict[str, Any]] = []

    async def keep_calling() -> None:
        draws, at_s = random.Random(0), 0.0
        while True:
            await asyncio.sleep(max(began + at_s - time.perf_counter(), 0))
            calls.append(asyncio.create_task(_call(next(turns), inputs, at_s, began)))
            at_s += draws.expovariate(rate_per_s)

    async with httpx.AsyncClient(base_url=url, verify=tls, timeout=PATIENCE_S) as operator:
        await operator.post("/v1/models:load", json={"name": MODEL, "version": 1})
        began = time.perf_counter()
        calling = asyncio.create_task(keep_calling())
        await asyncio.sleep(before_s)
        for swap in range(swaps):
            version = 2 - swap % 2
            from_s = time.perf_counter() - began
            answer = await operator.post(
                "/v1/models:load", json={"name": MODEL, "version": version}
            )
            answer.raise_for_status()
            until_s = time.perf_counter() - began
            loads.append({"version": version, "from_s": from_s, "until_s": until_s})
            # Unload it now, so that the next load really loads it.
            gone = await operator.post(
                "/v1/models:unload", json={"name": MODEL, "version": 3 - version}
            )
            gone.raise_for_status()
        calling.cancel()
    answered = [await call for call in calls]
    for client in clients:
        await client.aclose()
    return answered, loads


async def _call(
    client: httpx.AsyncClient, inputs: dict[str, Any], at_s: float, began: float
) -> dict[str, Any]:
    sent_s = time.perf_counter() - began
    answer = await client.post(
        f"/v1/models/{MODEL}:predict",
        json={"inputs": inputs},
        headers={"Cache-Control": "no-store"},
    )
    return {
        "at_s": at_s,
        "sent_s": sent_s,
        "status": answer.status_code,
        "version": answer.json().get("version"),
        # Counted from when the call was due, so that a slow platform cannot hide its delays.
        "latency_ms": (time.perf_counter() - began - at_s) * 1e3,
    }


def lines(document: dict[str, Any]) -> list[str]:
    """Describe what the swaps cost."""
    calls, loads = document["calls"], document["loads"]
    first_s = loads[0]["from_s"]
    before = [call["latency_ms"] for call in calls if call["at_s"] < first_s]
    during = [call["latency_ms"] for call in calls if call["at_s"] >= first_s]
    (was_50, was_99), (is_50, is_99) = (np.percentile(of, [50, 99]) for of in (before, during))
    took_s = np.median([load["until_s"] - load["from_s"] for load in loads])
    return [
        f"{len(loads)} swaps, {took_s:.2f} s each (median), at {document['rate_per_s']:g} calls/s",
        f"failed calls: {sum(call['status'] != 200 for call in calls)} of {len(calls)}",
        f"answers of the old version to calls sent after a load returned: {stale(document)}",
        f"p50 {was_50:.1f} ms before, {is_50:.1f} ms during ({is_50 / was_50:.2f})",
        f"p99 {was_99:.1f} ms before, {is_99:.1f} ms during ({is_99 / was_99:.2f})",
    ]


def stale(document: dict[str, Any]) -> int:
    """Count the calls that were answered by another version than the last load requested.

    Calls that were under way when the next load began may be answered by either version.
    """
    loads = document["loads"]
    ends = [load["from_s"] for load in loads[1:]] + [float("inf")]
    return sum(
        call["version"] not in (None, load["version"])
        for load, end in zip(loads, ends, strict=True)
        for call in document["calls"]
        if load["until_s"] < call["sent_s"] and call["at_s"] + call["latency_ms"] / 1e3 < end
    )
