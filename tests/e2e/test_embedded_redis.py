"""The embedded Redis of a running platform: nobody else reaches it, and it may be full."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
import redis

from inferno import names
from inferno.client import Client
from inferno.operate.ports import free_port
from inferno.operate.redis_program import find_program
from inferno.settings import Settings
from inferno.testing.platform import Platform, running_platform
from inferno.testing.processes import ROOT, wait_until
from tasks.broker.connection import connect
from tasks.state.cluster import Cluster
from tests.outsider import as_nobody, needs_root

#: About 20 MB more than an empty server takes.
MAXMEMORY_BYTES = 24_000_000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform with little memory for its Redis, which also listens on a port."""
    models = tmp_path_factory.mktemp("models")
    (models / "echo").symlink_to(ROOT / "models" / "echo")
    env = {
        "INFERNO_REPOSITORY__ROOT": str(models),
        "INFERNO_REDIS__MAXMEMORY_BYTES": str(MAXMEMORY_BYTES),
        "INFERNO_REDIS__PORT": str(free_port()),
    }
    with running_platform(tmp_path_factory.mktemp("small"), env, "--no-flower") as platform:
        yield platform


def test_nearly_full_redis_refuses_new_tasks_and_ends_those_that_it_took(small: Platform) -> None:
    with (
        Client(small.url) as client,
        httpx.Client(base_url=small.url) as http,
        connect(Settings(redis={"url": small.redis_url})) as store,
    ):
        client.pause("echo")
        *accepted, cancelled = filled(http)
        client.cancel(cancelled)
        client.resume("echo")
        for task_id in accepted:
            assert client.result(task_id, timeout_s=60).outputs["text"].size == 1
        # They take as much memory as the tasks did, until they expire.
        assert submitted(http).status_code == 503
        store.unlink(*map(names.result_key, accepted))
        wait_until(lambda: submitted(http).status_code == 202)

        client.pause("echo")
        filled(http)
        count = client.lane("echo")["waiting"]
        assert count
        assert client.purge("echo", count) == count
        client.resume("echo")
        wait_until(lambda: submitted(http).status_code == 202)


def submitted(http: httpx.Client) -> httpx.Response:
    return http.post("/infer", json={"model": "echo", "inputs": {"text": "x" * 50_000}})


def filled(http: httpx.Client) -> list[str]:
    """Submit until Redis is nearly full; returns the ids of the accepted tasks."""
    accepted = []
    while (answer := submitted(http)).status_code == 202:
        accepted.append(answer.json()["task_id"])
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "Redis is nearly full: " in answer.json()["detail"]
    return accepted


def test_full_redis_refuses_new_tasks_and_loses_none_that_it_took(small: Platform) -> None:
    with (
        Client(small.url) as client,
        httpx.Client(base_url=small.url) as http,
        connect(Settings(redis={"url": small.redis_url})) as store,
    ):
        client.pause("echo")
        accepted = [client.submit("echo", f"accepted {n}") for n in range(20)]
        fill(store)

        refused = [
            http.post("/infer", json={"model": "echo", "inputs": {"text": "x" * 50_000}}),
            http.post("/v1/models/echo:predict", json={"inputs": {"text": "x" * 50_000}}),
        ]
        for answer in refused:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "full" in answer.text

        # What makes room or keeps workers alive still works.
        refused_at = time.time()
        accepted.pop().cancel()
        client.resume("echo")
        client.pause("echo")
        cluster = Cluster(store, Settings())
        wait_until(lambda: cluster.workers(0)[0].reported_at > refused_at)

        store.unlink("filler")
        client.resume("echo")
        texts = [task.result(timeout_s=60).outputs["text"].item() for task in accepted]
        assert texts == [f"accepted {n}" for n in range(19)]
        wait_until(lambda: submitted(http).status_code == 202)


def fill(store: redis.Redis) -> None:
    """Write until nothing more fits."""
    for size in (1_000_000, 10_000, 100):
        try:
            while True:
                store.rpush("filler", "x" * size)
        except redis.OutOfMemoryError:
            continue


@pytest.mark.skipif(find_program().version < (7, 0), reason="Redis 6.2 counts no subcommands")
def test_redis_denies_nothing_to_the_platform(small: Platform, platform: Platform) -> None:
    for each in (small, platform):
        with connect(Settings(redis={"url": each.redis_url})) as store:
            statistics = store.info("commandstats")
        # A full server also rejects writes, and scripts that may write.
        scripts = () if each is small else ("eval",)
        others = ("acl", "client", "config", "info", "publish", "script", "subscribe")
        commands = (*scripts, *others)
        rejected = {
            name: each["rejected_calls"]
            for name, each in statistics.items()
            if name.removeprefix("cmdstat_").startswith(commands)
        }
        assert rejected
        assert not any(rejected.values()), rejected


def test_password_is_in_no_log_and_no_command_line(small: Platform) -> None:
    password = (small.data / "redis" / "password.txt").read_text().strip()
    texts = [path.read_text(errors="replace") for path in small.data.rglob("*.log")]
    family = [psutil.Process(small.popen.pid), *psutil.Process(small.popen.pid).children(True)]
    texts += [" ".join(process.cmdline()) for process in family]

    assert len(texts) > 5
    assert [text for text in texts if password in text] == []


@needs_root
def test_other_users_reach_nothing(small: Platform, platform: Platform) -> None:
    for data in (small.data, platform.data):
        folder = data / "redis"
        # As if every folder above were open: pytest closes its own.
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o077 for path in [folder, *files]} == {0}
        assert as_nobody("connect", folder / "redis.sock") == "PermissionError"
    assert as_nobody("ask", int(small.env["INFERNO_REDIS__PORT"])).startswith("-NOAUTH")
    assert listening(platform) == []


def listening(platform: Platform) -> list[int]:
    """Return the ports on which the platform's Redis listens."""
    family = psutil.Process(platform.popen.pid).children(True)
    (server,) = [process for process in family if process.name() == "redis-server"]
    return [c.laddr.port for c in server.net_connections("inet") if c.status == "LISTEN"]
