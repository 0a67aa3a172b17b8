"""Hundreds of WebSocket clients: each receives its own result, once, over one Redis connection."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import httpx
import redis
import websocket

from inferno.testing.processes import wait_until

CLIENTS = 200


def connect(url: str, path: str) -> websocket.WebSocket:
    return websocket.create_connection(url.replace("http", "ws", 1) + path, timeout=60)


def submit(http: httpx.Client, text: str) -> str:
    answer = http.post("/infer", json={"model": "mock", "inputs": text})
    assert answer.status_code == 202, answer.text
    return answer.json()["task_id"]


def web_connections(url: str) -> Counter[str]:
    """Count the web tier's Redis connections that wait for results."""
    with redis.Redis.from_url(url) as client:
        return Counter(c["name"] for c in client.client_list() if c["name"] == "inferno-web")


def test_two_hundred_single_sockets_receive_their_own_result_once(platform):
    with httpx.Client(base_url=platform.url, timeout=30) as http, ExitStack() as stack:
        submit(http, "sleep:3000")
        ids = [submit(http, f"text {n}") for n in range(CLIENTS)]
        sockets = [stack.enter_context(closing(connect(platform.url, f"/ws/{i}"))) for i in ids]
        during = web_connections(platform.redis_url)
        with ThreadPoolExecutor(16) as pool:
            frames = list(pool.map(lambda socket: json.loads(socket.recv()), sockets))
            ends = list(pool.map(lambda socket: socket.recv(), sockets))
    for n, (task_id, frame) in enumerate(zip(ids, frames, strict=True)):
        assert frame["type"] == "result"
        assert frame["data"]["task_id"] == task_id
        assert frame["data"]["outputs"]["text"]["data"] == [f"text {n}"]
    assert ends == [""] * CLIENTS
    # One for each web process at most, whatever the number of clients.
    assert during["inferno-web"] <= 2
    assert web_connections(platform.redis_url) == during


def test_two_hundred_tasks_of_one_socket_arrive_once(platform):
    with closing(connect(platform.url, "/ws")) as socket:
        for n in range(CLIENTS):
            message = {"type": "submit", "id": str(n), "model": "mock", "inputs": f"text {n}"}
            socket.send(json.dumps(message))
        accepted: dict[str, str] = {}
        results: Counter[str] = Counter()
        while sum(results.values()) < CLIENTS:
            frame = json.loads(socket.recv())
            if frame["type"] == "accepted":
                accepted[frame["data"]["task_id"]] = frame["id"]
            else:
                assert frame["type"] == "result"
                text = frame["data"]["outputs"]["text"]["data"][0]
                assert text == f"text {accepted[frame['task_id']]}"
                results[frame["task_id"]] += 1
        socket.send(json.dumps({"type": "ping", "id": "end"}))
        assert json.loads(socket.recv()) == {"type": "pong", "id": "end"}
    assert results == Counter(dict.fromkeys(accepted, 1))


def test_whoever_comes_late_is_served_too(platform):
    with httpx.Client(base_url=platform.url, timeout=30) as http:
        ids = [submit(http, f"late {n}") for n in range(50)]
        wait_until(
            lambda: all(http.get(f"/tasks/{i}").json()["status"] == "succeeded" for i in ids)
        )
    with closing(connect(platform.url, "/ws")) as socket:
        socket.send(json.dumps({"type": "subscribe", "task_ids": ids}))
        frames = [json.loads(socket.recv()) for _ in ids]
    assert Counter(frame["task_id"] for frame in frames) == Counter(ids)
    with closing(connect(platform.url, f"/ws/{ids[0]}")) as socket:
        assert json.loads(socket.recv())["data"]["outputs"]["text"]["data"] == ["late 0"]
