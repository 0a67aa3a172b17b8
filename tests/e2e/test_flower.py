"""Flower, started with the platform, shows the members of batches."""

from __future__ import annotations

import httpx

from inferno.client import Client, Request
from tests.processes import wait_until


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
            "mock",
            "sentiment",
            "webhooks",
        ]


def test_the_front_page_links_to_flower(platform):
    assert platform.flower_url in httpx.get(platform.url).text
