"""The platform on brokers other than Redis Streams."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing

import pytest
import websocket

from inferno.client import Client, Request
from inferno.operate.ports import free_port
from inferno.settings import Settings
from inferno.testing.platform import running_platform
from inferno.testing.processes import ROOT, wait_until
from tasks.broker.connection import connect
from tasks.state.cluster import Cluster


@pytest.fixture(scope="module", params=["redis", "amqp"])
def platform(request, tmp_path_factory):
    """A platform with the model echo."""
    if request.param == "amqp":
        env = {"INFERNO_BROKER__URL": request.getfixturevalue("amqp_url")}
    else:
        # The platform's own Redis, which then needs a port that is known beforehand.
        port, password = str(free_port()), "of-the-lists-in-tests"
        env = {
            "INFERNO_REDIS__PORT": port,
            "INFERNO_REDIS__PASSWORD": password,
            "INFERNO_BROKER__URL": f"redis://:{password}@127.0.0.1:{port}/0",
        }
    models = tmp_path_factory.mktemp("models")
    (models / "echo").symlink_to(ROOT / "models" / "echo")
    env["INFERNO_REPOSITORY__ROOT"] = str(models)
    # Another one may know up to a second later that the model is ready.
    env["INFERNO_SERVER__PROCESSES"] = "1"
    with running_platform(tmp_path_factory.mktemp(request.param), env, "--no-flower") as platform:
        yield platform


def test_each_way_to_ask_is_answered(platform):
    with Client(platform.url) as client:
        assert client.predict("echo", "at once").outputs["text"].tolist() == ["at once"]
        task = client.submit("echo", "later", priority=9)
        assert task.result().outputs["text"].tolist() == ["later"]
        requests = [Request("echo", f"{n}", priority=n % 10) for n in range(100)]
        texts = [result.outputs["text"].item() for result in client.stream(requests)]
    assert sorted(texts) == sorted(f"{n}" for n in range(100))
    with closing(websocket.create_connection(platform.url.replace("http", "ws") + "/ws")) as socket:
        message = {"type": "submit", "id": "a", "model": "echo", "inputs": "socket"}
        socket.send(json.dumps(message))
        assert json.loads(socket.recv())["type"] == "accepted"
        assert json.loads(socket.recv())["data"]["outputs"]["text"]["data"] == ["socket"]


def test_what_is_submitted_while_the_worker_restarts_is_answered(platform):
    with connect(Settings(redis={"url": platform.redis_url})) as redis:
        cluster = Cluster(redis, Settings())
        (before,) = cluster.workers()
        os.kill(before.pid, signal.SIGTERM)
        with Client(platform.url) as client:
            tasks = [client.submit("echo", f"meanwhile {n}") for n in range(20)]
            answers = [task.result(timeout_s=60) for task in tasks]
        wait_until(lambda: [w.pid for w in cluster.workers() if w.pid != before.pid])
    assert [answer.outputs["text"].tolist() for answer in answers] == [
        [f"meanwhile {n}"] for n in range(20)
    ]
