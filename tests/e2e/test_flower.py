"""Flower, started with the platform, shows the members of batches."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import httpx
import kombu.pools
import pytest
from celery import Celery

from inferno.client import Client, Request
from inferno.operate.ports import free_port
from inferno.settings import Settings
from inferno.testing.processes import ROOT, command_path, process, redis_server, wait_until
from tasks.broker.connection import connect
from tasks.broker.lanes import Lanes, TaskMessage
from tasks.transport import register


def test_flower_lists_the_members_of_batches(platform):
    with Client(platform.url) as client:
        requests = [Request("echo", f"member {n}") for n in range(20)]
        ids = {result.task_id for result in client.stream(requests)}
    with httpx.Client(base_url=platform.flower_url, timeout=10) as flower:

        def listed():
            tasks = flower.get("/api/tasks", params={"taskname": "infer.echo"}).json()
            return {i: task for i, task in tasks.items() if i in ids}

        wait_until(lambda: {t["state"] for t in listed().values()} == {"SUCCESS"})
        tasks = listed()
        assert tasks.keys() == ids
        assert {task["name"] for task in tasks.values()} == {"infer.echo"}
        assert all(task["received"] <= task["started"] for task in tasks.values())
        workers = flower.get("/api/workers", params={"refresh": "true"}).json()
        assert sorted(name.split("-")[0] for name in workers) == [
            "digits",
            "echo",
            "embed",
            "insight",
            "mock",
            "sentiment",
            "webhooks",
        ]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:5555", "Origin": "http://evil.example:5555"}, 421),
    ],
)
def test_pages_of_other_sites_do_not_drive_flower(platform, headers, status):
    with httpx.Client(base_url=platform.flower_url, timeout=10) as flower:
        before = workers(flower)
        echo = next(name for name in before if name.startswith("echo-"))
        for path in (
            f"/api/worker/shutdown/{echo}",
            f"/api/worker/queue/cancel-consumer/{echo}?queue=echo",
            f"/api/worker/pool/shrink/{echo}?n=1",
            "/api/task/async-apply/infer.echo",
            "/api/task/revoke/some?terminate=true",
            "/no/such/page",
        ):
            for content in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
                answer = flower.post(path, headers={**headers, "Content-Type": content}, content="")
                assert answer.status_code == status, path
        assert workers(flower) == before


def test_flower_answers_by_its_own_names_only(platform):
    with httpx.Client(base_url=platform.flower_url, timeout=10) as flower:
        for path in ("/", "/api/workers", "/static/js/flower.js", "/metrics", "/none"):
            refused = flower.get(path, headers={"Host": "evil.example"})
            assert refused.status_code == 421
            assert "INFERNO_SERVER__HOSTS" in refused.text
        for host in ("localhost:5555", "127.0.0.1", "[::1]:5555"):
            assert flower.get("/", headers={"Host": host}).status_code == 200


def test_other_pages_cannot_read_or_frame_flower(platform):
    with httpx.Client(base_url=platform.flower_url, timeout=10) as flower:
        for path in ("/", "/api/workers", "/static/js/flower.js", "/none"):
            answer = flower.get(path, headers={"Origin": "https://evil.example"})
            assert "Access-Control-Allow-Origin" not in answer.headers
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


def test_flowers_own_pages_still_act(platform):
    headers = {"Origin": platform.flower_url, "Sec-Fetch-Site": "same-origin"}
    url = f"{platform.flower_url}/api/worker/shutdown/nobody"
    assert httpx.post(url, headers=headers).status_code == 404


def workers(flower: httpx.Client) -> dict[str, object]:
    """Return what each worker consumes and how large its pool is, as Flower's API says."""
    found = flower.get("/api/workers", params={"refresh": "true"}).json()
    return {
        name: (worker["stats"]["pool"], [queue["name"] for queue in worker["active_queues"]])
        for name, worker in found.items()
    }


def test_flower_shows_the_exact_backlog_of_lanes(platform):
    settings = Settings(redis={"url": platform.redis_url})
    register()
    with connect(settings) as redis, Client(platform.url) as web:
        lanes = Lanes(Celery(broker=settings.broker_url), redis, settings)
        lanes.pause("echo")
        try:
            tasks = [web.submit("echo", f"paused {n}") for n in range(7)]
            assert lengths(platform.flower_url)["echo"] == 7
            assert shown(platform.flower_url)["echo"] == "7"
        finally:
            lanes.resume("echo")
        for task in tasks:
            task.result()
        assert lengths(platform.flower_url)["echo"] == 0


@pytest.fixture
def empty_redis_url(tmp_path):
    with redis_server(tmp_path) as url:
        yield url


def test_flower_shows_lanes_that_have_no_worker(tmp_path, empty_redis_url, log):
    (tmp_path / "echo").symlink_to(ROOT / "models" / "echo")
    port = free_port()
    env = {
        "INFERNO_REDIS__URL": empty_redis_url,
        "INFERNO_REPOSITORY__ROOT": str(tmp_path),
        "INFERNO_FLOWER__PORT": str(port),
        "FLOWER_UNAUTHENTICATED_API": "true",
    }
    command = ["celery", "-A", "tasks", "flower", "--conf=monitoring/flower_conf.py"]
    settings = Settings(redis={"url": empty_redis_url})
    register()
    with (
        connect(settings) as redis,
        Celery(broker=settings.broker_url) as celery,
        process([command_path(command[0]), *command[1:]], env, log),
    ):
        lanes = Lanes(celery, redis, settings)
        lanes.send(TaskMessage("echo", "infer.echo", "now", {}))
        later = datetime.now(UTC) + timedelta(hours=1)
        lanes.send(TaskMessage("echo", "infer.echo", "later", {}, eta=later))
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: b"Visit me at" in log.read_bytes())
        assert lengths(url) == {"celery": 0, "echo": 2, "webhooks": 0}
        assert shown(url) == {"celery": "0", "echo": "2", "webhooks": "0"}
        kombu.pools.reset()


def test_flower_warns_when_others_can_reach_it(redis_url, log):
    port = free_port()
    env = {
        "INFERNO_REDIS__URL": redis_url,
        "INFERNO_FLOWER__HOST": "0.0.0.0",
        "INFERNO_FLOWER__PORT": str(port),
    }
    command = ["celery", "-A", "tasks", "flower", "--conf=monitoring/flower_conf.py"]
    with process([command_path(command[0]), *command[1:]], env, log):
        wait_until(lambda: b"Visit me at" in log.read_bytes())
    assert f"Flower listens on 0.0.0.0, port {port}" in log.read_text()


def lengths(url: str) -> dict[str, int]:
    """Return what Flower's API says of queues."""
    queues = httpx.get(f"{url}/api/queues/length").json()["active_queues"]
    return {queue["name"]: queue["messages"] for queue in queues}


def shown(url: str) -> dict[str, str]:
    """Return what Flower's page says of queues."""
    page = httpx.get(f"{url}/broker").text
    cells = re.findall(r'<tr id="[^"]*">\s*<td[^>]*>(.*?)</td>\s*<td[^>]*>(.*?)</td>', page)
    return dict(cells)


def test_the_front_page_links_to_flower(platform):
    assert platform.flower_url in httpx.get(platform.url).text
