"""Can jobs be batched without losing the latency SLA?

`mock` takes 5 ms for a forward pass and 0.05 ms for each row. One copy takes up to 32 tasks in a
batch, the other runs every task alone. Calls arrive at random at a fixed rate, whether or not
earlier ones are answered, over eight WebSockets. Latency counts from when a call was due.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import numpy as np
import websocket

from bench.scenarios.packages import add_mock
from inferno.testing.platform import running

QUESTION = "Can jobs be batched without losing the latency SLA?"

#: Latency objective for 95 of a hundred calls, in ms.
SLA_MS = 50.0
PERCENTILES = (50, 95, 99)
#: Largest batch of each model.
MODELS = {"batched": 32, "alone": 1}
#: Rates by model, in calls a second.
RATES = {
    "batched": (10, 25, 50, 100, 150, 200, 300, 400, 600),
    "alone": (10, 25, 50, 100, 150, 200, 300),
}
SECONDS = 2.0
#: WebSockets that calls use in turn.
SOCKETS = 8
#: Limit for the next answer on a socket, in seconds.
PATIENCE_S = 20.0


def measure(
    folder: Path, rates: Mapping[str, Sequence[float]] = RATES, seconds: float = SECONDS
) -> dict[str, Any]:
    """Call both models at each rate.

    Args:
      folder: empty folder for the platform's files.
      rates: calls a second by model, ascending.
      seconds: length of each rate.
    Returns:
      `sla_ms`; `points`, each with `model`, `rate_per_s`, `calls`, `latency_ms` by percentile and
      `mean_batch`.
    """
    for model, size in MODELS.items():
        add_mock(folder / "models", model, batching={"max_batch_size": size})
    env = {"INFERNO_REPOSITORY__ROOT": str(folder / "models")}
    points = []
    with running(folder, env, "--no-flower") as platform:
        address = platform.url.replace("http", "ws", 1) + "/ws"
        for model in MODELS:
            _drive(address, model, 50, 0.5)
            points += [
                _point(model, rate, *_drive(address, model, rate, seconds)) for rate in rates[model]
            ]
    return {"sla_ms": SLA_MS, "points": points}


def _point(
    model: str, rate: float, latencies_ms: Sequence[float], batches: Counter[str]
) -> dict[str, Any]:
    values = np.percentile(latencies_ms, PERCENTILES)
    return {
        "model": model,
        "rate_per_s": rate,
        "calls": len(latencies_ms),
        "latency_ms": {f"p{p}": round(v, 2) for p, v in zip(PERCENTILES, values, strict=True)},
        "mean_batch": round(len(latencies_ms) / len(batches), 2),
    }


def _drive(
    address: str, model: str, rate: float, seconds: float
) -> tuple[list[float], Counter[str]]:
    """Call at a rate; return the latencies in ms, and the number of tasks by batch.

    Raises:
      RuntimeError: a call was not answered.
    """
    draws = random.Random(0)
    due = list(accumulate(draws.expovariate(rate) for _ in range(max(1, int(rate * seconds)))))
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(closing(websocket.create_connection(address, timeout=PATIENCE_S)))
            for _ in range(SOCKETS)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(SOCKETS))
        began = time.perf_counter() + 0.05
        receiving = [
            pool.submit(_receive, socket, len(due[n::SOCKETS])) for n, socket in enumerate(sockets)
        ]
        for n, (at, socket) in enumerate(zip(due, cycle(sockets), strict=False)):
            time.sleep(max(began + at - time.perf_counter(), 0))
            message = {"type": "submit", "model": model, "inputs": {"text": str(n)}}
            socket.send(json.dumps(message))
        answers = [answer for each in receiving for answer in each.result()]
    latencies_ms = [(at - began - due[n]) * 1e3 for n, at, _ in answers]
    return latencies_ms, Counter(batch for _, _, batch in answers)


def _receive(socket: websocket.WebSocket, calls: int) -> list[tuple[int, float, str]]:
    """Return number, time of the answer and batch of each call on a socket."""
    answers: list[tuple[int, float, str]] = []
    while len(answers) < calls:
        opcode, data = socket.recv_data()
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            raise RuntimeError(f"the platform closed a socket: {data!r}")
        message = json.loads(data)
        if message["type"] == "accepted":
            continue
        if message["type"] != "result":
            raise RuntimeError(f"a call was answered with {message}")
        view = message["data"]
        number = int(view["outputs"]["text"]["data"][0])
        answers.append((number, time.perf_counter(), view["batch"]["id"]))
    return answers


def kept_up_to(document: dict[str, Any], model: str) -> float:
    """Return the highest rate up to which all rates met the SLA; 0 if none did."""
    kept = 0.0
    for point in document["points"]:
        if point["model"] == model:
            if point["latency_ms"]["p95"] > document["sla_ms"]:
                break
            kept = point["rate_per_s"]
    return kept


def answer(document: dict[str, Any]) -> list[str]:
    """Summarise up to which rate the SLA holds, with and without batches."""
    kept = {model: kept_up_to(document, model) for model in MODELS}
    batched = [point for point in document["points"] if point["model"] == "batched"]
    first = batched[0]
    # If not even the lowest rate met the SLA, describe that rate.
    last = next((p for p in batched if p["rate_per_s"] == kept["batched"]), first)
    return [
        f"{'Yes' if kept['batched'] > kept['alone'] else 'No'}: p95 is under "
        f"{document['sla_ms']:g} ms up to {kept['batched']:g} calls/s with batches, "
        f"{kept['alone']:g} without.",
        f"At {last['rate_per_s']:g} calls/s {last['mean_batch']:.1f} tasks shared a batch, "
        f"and p95 was {last['latency_ms']['p95']:.0f} ms.",
        f"At {first['rate_per_s']:g} calls/s, where nobody comes to share, "
        f"p50 was {first['latency_ms']['p50']:.0f} ms: a lone call does not wait for others.",
    ]
