"""The web tier as it is deployed, while its Redis is away or full."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import httpx
import pytest
import redis
import websocket

from inferno import names
from inferno.operate.ports import free_port
from inferno.settings import Settings
from inferno.testing.processes import redis_server, wait_until, web
from tests.integration.web.conftest import FakeWorker

NATIVE = {"model": "sentiment", "inputs": {"text": "Good."}}
PREDICT = "/v1/models/sentiment:predict"
KEY = {"Idempotency-Key": "once"}


class Server:
    """A Redis that can be stopped and started again, at the same address and empty."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._running = ExitStack()

    def start(self):
        # It is ready when its own log says so.
        (self.folder / "redis.log").unlink(missing_ok=True)
        self._running.enter_context(redis_server(self.folder, self.port))

    def stop(self):
        self._running.close()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def settings(server, repository):
    return Settings.model_validate(
        {"redis": {"url": server.url}, "repository": {"root": repository}}
    )


@pytest.fixture
def store(server):
    with redis.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def address(settings, log):
    env = {
        "INFERNO_REDIS__URL": settings.redis_url,
        "INFERNO_REPOSITORY__ROOT": str(settings.repository.root),
    }
    with web(env, log) as address:
        yield address


@pytest.fixture
def http(address):
    # Generous: an answer that comes at all while Redis is away did not wait for it.
    with httpx.Client(base_url=f"http://{address}", timeout=60) as client:
        yield client


def ask(http):
    """Try everything that needs Redis."""
    return [
        http.post("/infer", json=NATIVE),
        http.post("/infer", json=NATIVE, headers=KEY),
        http.post("/infer", json=NATIVE, headers={"Prefer": "wait=30"}),
        http.post("/infer", json=NATIVE | {"timeout_ms": 1000}),
        http.post(PREDICT, json={"inputs": {"text": "Good."}}),
    ]


def refused(answer):
    assert answer.status_code == 503
    assert answer.json()["code"] == "broker_unavailable"
    assert int(answer.headers["Retry-After"]) >= 1
    return True


def test_publishers_hear_at_once_that_redis_is_away(http, server, until):
    assert http.post("/infer", json=NATIVE).status_code == 202
    server.stop()
    assert all(refused(answer) for answer in ask(http))
    assert refused(http.get("/tasks/some-id"))
    assert http.get("/health/live").status_code == 200
    server.start()
    accepted = http.post("/infer", json=NATIVE, headers=KEY)
    assert accepted.status_code == 202
    assert "Idempotency-Replayed" not in accepted.headers


def test_full_redis_takes_nothing_and_nothing_is_half_done(http, store, settings):
    FakeWorker(store, settings).serve(sentiment=[1, 2])
    keys = set(store.scan_iter())
    store.config_set("maxmemory-policy", "noeviction")
    store.config_set("maxmemory", 1)
    assert all(refused(answer) for answer in ask(http))
    assert set(store.scan_iter()) == keys
    # What only reads goes on.
    assert http.get("/tasks/some-id").status_code == 404
    store.config_set("maxmemory", 0)
    wait_until(lambda: http.post("/infer", json=NATIVE).status_code == 202)
    accepted = http.post("/infer", json=NATIVE, headers=KEY)
    assert accepted.status_code == 202
    assert "Idempotency-Replayed" not in accepted.headers


def test_sockets_stay_open_and_recover_what_they_wait_for(
    address, http, server, store, settings, until
):
    many = websocket.create_connection(f"ws://{address}/ws", timeout=60)
    many.send(json.dumps({"type": "submit", "id": 1, **NATIVE}))
    first = json.loads(many.recv())["data"]["task_id"]
    second = http.post("/infer", json=NATIVE).json()["task_id"]
    one = websocket.create_connection(f"ws://{address}/ws/{second}", timeout=60)
    until(lambda: len(store.pubsub_channels(names.result_key("*"))) == 2)
    server.stop()
    many.send(json.dumps({"type": "submit", "id": 2, **NATIVE}))
    answer = json.loads(many.recv())
    assert (answer["type"], answer["id"]) == ("error", 2)
    assert answer["data"]["code"] == "broker_unavailable"
    many.send('{"type": "ping"}')
    assert json.loads(many.recv()) == {"type": "pong"}
    server.start()
    worker = FakeWorker(store, settings)
    # What the fake worker does not write, and real ones do.
    for task_id in (first, second):
        store.hset(names.record_key(settings.redis.prefix, task_id), "accepted_at", time.time())
    # One is over before the connection is back, the other after.
    worker.succeed(first)
    answer = json.loads(many.recv())
    assert (answer["type"], answer["task_id"]) == ("result", first)
    until(lambda: store.pubsub_channels(names.result_key(second)))
    worker.succeed(second)
    answer = json.loads(one.recv())
    assert (answer["type"], answer["task_id"]) == ("result", second)
    one.shutdown()
    many.shutdown()
