"""Flower, started with the platform, shows the members of batches."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import httpx
import kombu.pools
from celery import Celery

from inferno.client import Client, Request
from inferno.operate.ports import free_port
from inferno.settings import Settings
from inferno.testing.processes import ROOT, command_path, process, wait_until
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


def test_flower_shows_lanes_that_have_no_worker(tmp_path, redis_url, log):
    (tmp_path / "echo").symlink_to(ROOT / "models" / "echo")
    port = free_port()
    env = {
        "INFERNO_REDIS__URL": redis_url,
        "INFERNO_REPOSITORY__ROOT": str(tmp_path),
        "INFERNO_FLOWER__PORT": str(port),
        "FLOWER_UNAUTHENTICATED_API": "true",
    }
    command = ["celery", "-A", "tasks", "flower", "--conf=monitoring/flower_conf.py"]
    settings = Settings(redis={"url": redis_url})
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
