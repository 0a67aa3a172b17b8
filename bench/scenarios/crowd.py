"""What happens when 1000 clients hit /infer?

Each client has its own connection. All submit in the same moment, and each follows its task to the
result. The times at which tasks were accepted and finished are the platform's, because one program
that plays a thousand clients notices them late.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from bench.scenarios.packages import add_mock
from inferno.testing.platform import running

QUESTION = "What happens when 1000 clients hit /infer?"

CLIENTS = 1000
MAX_BATCH_SIZE = 32
#: Events of a task, and the members of its view with their times.
TIMES = {"accepted": "accepted_at", "finished": "finished_at"}
#: Limit of one call, in seconds.
PATIENCE_S = 60


def measure(folder: Path, clients: int = CLIENTS) -> dict[str, Any]:
    """Let a crowd submit, and wait for all the results.

    Args:
      folder: empty folder for the platform's files.
      clients: number of clients.
    Returns:
      `clients`, `max_batch_size`; `tasks`, one for each client, with the times in seconds since the
      start at which it was accepted and finished, and at which its client was told of either, or
      its `problem`; `batches`, each with its `size` and `finished_s`.
    """
    batching = {"max_batch_size": MAX_BATCH_SIZE}
    add_mock(folder / "models", "mock", batching=batching)
    env = {"INFERNO_REPOSITORY__ROOT": str(folder / "models")}
    with running(folder, env, "--no-flower") as platform:
        tasks = asyncio.run(_crowd(platform.url, clients))
    batches: dict[str, dict[str, Any]] = {}
    for task in tasks:
        batch = task.pop("batch", None)
        if batch is not None:
            batches[batch["id"]] = {"finished_s": task["finished_s"], "size": batch["size"]}
    return {
        "clients": clients,
        "max_batch_size": MAX_BATCH_SIZE,
        "tasks": tasks,
        "batches": sorted(batches.values(), key=lambda batch: float(batch["finished_s"])),
    }


async def _crowd(url: str, clients: int) -> list[dict[str, Any]]:
    # One TLS context for all: creating one takes longer than a call.
    tls = ssl.create_default_context()
    crowd = [
        httpx.AsyncClient(base_url=url, verify=tls, timeout=PATIENCE_S) for _ in range(clients)
    ]
    try:
        # Connect all at once: the server closes connections that stay idle for too long.
        await asyncio.gather(*(client.get("/health/live") for client in crowd))
        began = time.time()
        seen = [_follow(client, f"client {n}", began) for n, client in enumerate(crowd)]
        return await asyncio.gather(*seen)
    finally:
        await asyncio.gather(*(client.aclose() for client in crowd))


async def _follow(client: httpx.AsyncClient, text: str, began: float) -> dict[str, Any]:
    """Submit a task and wait for its result."""
    try:
        answer = await client.post("/infer", json={"model_id": "mock", "input": text})
        if answer.status_code != 202:
            return {"problem": f"its submit was answered with {answer.status_code}"}
        told = time.time()
        path = f"/tasks/{answer.json()['task_id']}"
        view = (await client.get(path, params={"wait": PATIENCE_S})).json()
    except httpx.HTTPError as exc:
        return {"problem": f"{type(exc).__name__}: {exc}"}
    if view["status"] != "succeeded":
        return {"problem": f"its task is {view['status']}"}
    if view["outputs"]["text"]["data"] != [text]:
        return {"problem": "it got another client's answer"}
    times = {name: datetime.fromisoformat(view[key]).timestamp() for name, key in TIMES.items()}
    times |= {"told": told, "answered": time.time()}
    since = {f"{name}_s": round(at - began, 3) for name, at in times.items()}
    return {**since, "batch": view["batch"]}


def answer(document: dict[str, Any]) -> list[str]:
    """Summarise what happened."""
    tasks, batches, clients = document["tasks"], document["batches"], document["clients"]
    problems = [task["problem"] for task in tasks if "problem" in task]
    if problems:
        return [f"{len(problems)} of {clients} clients got no answer.", f"For one, {problems[0]}."]
    accepted_s, finished_s, told_s, answered_s = (
        max(task[f"{name}_s"] for task in tasks) for name in (*TIMES, "told", "answered")
    )
    mean = clients / len(batches)
    return [
        f"{clients} clients: all accepted in {accepted_s:.1f} s, all done in {finished_s:.1f} s.",
        f"They ran in {len(batches)} batches of {mean:.0f} on average. The last client read its "
        f"202 after {told_s:.1f} s, and its result after {answered_s:.1f} s.",
        "None was refused, lost or given another client's answer.",
    ]
