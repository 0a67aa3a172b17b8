"""After all kinds of calls, every key in Redis is one that the documents name, and is bounded."""

from __future__ import annotations

import functools
import json
import re
import uuid
from typing import Any

import httpx
import pytest
import redis
import websocket
from celery import Celery

from inferno import names
from inferno.settings import Settings
from inferno.testing.platform import Platform
from inferno.testing.processes import ROOT, wait_until
from tasks.transport import register

#: Placeholders of the documents.
PLACES = {
    "<id>": r"[0-9a-f-]{36}",
    "<digest>": "[0-9a-f]{64}",
    "<uuid>": r"[0-9a-f-]{36}",
    "<0-9>": "[0-9]",
}


def documented() -> list[tuple[re.Pattern[str], str, str]]:
    """Return the pattern, type and bound of each key in the documents."""
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("## Keys in Redis\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "| `" in line]
    found = []
    for keys, kind, _, bound in rows:
        for name in re.findall("`(.*?)`", keys):
            parts = re.split("(<.*?>)", name)
            pattern = "".join(
                PLACES.get(part, ".+") if part.startswith("<") else re.escape(part)
                for part in parts
            )
            found.append((re.compile(pattern, re.DOTALL), kind, bound))
    return found


def row_of(key: str) -> tuple[str, str]:
    """Return the type and bound of a key; the most exact row counts."""
    rows = [(len(p.pattern), kind, bound) for p, kind, bound in documented() if p.fullmatch(key)]
    assert rows, f"{key}: no row of docs/operations.md names it"
    _, kind, bound = max(rows)
    return kind, bound


def use_everything(platform: Platform) -> None:
    """Call the platform in every way that leaves something in Redis."""
    with httpx.Client(base_url=platform.url, timeout=30) as http:

        def submit(model: str, text: str, **fields: Any) -> str:
            body = {"model": model, "inputs": {"text": text}} | fields
            answer = http.post("/infer", json=body, headers=fields.pop("headers", {}))
            assert answer.status_code == 202, answer.text
            return str(answer.json()["task_id"])

        for text in ("same", "same", "other"):
            predicted = http.post("/v1/models/embed:predict", json={"inputs": {"text": text}})
            assert predicted.status_code == 200, predicted.text
        http.post("/v1/models/insight:predict", json={"inputs": {"text": "Lovely."}})
        key = {"Idempotency-Key": "keys-of-redis"}
        body = {"model": "echo", "inputs": {"text": "once"}}
        assert http.post("/infer", json=body, headers=key).status_code == 202
        tasks = [
            submit("echo", "hello"),
            submit("echo", "x" * 200_000),
            submit("mock", "poison!"),
            submit("echo", "hooked", webhook="https://webhooks.invalid/x"),
        ]
        http.post("/lanes/echo/pause")
        cancelled = submit("echo", "cancelled")
        http.delete(f"/tasks/{cancelled}")
        expired = submit("echo", "expired", timeout_ms=1)
        http.post("/lanes/echo/resume")
        http.post("/v1/models:load", json={"name": "digits", "version": 1, "activate": False})
        for task_id in [*tasks, cancelled, expired]:
            wait_until(functools.partial(over, http, task_id), 30)
    with_socket(platform)
    register()
    app = Celery(broker=Settings(redis={"url": platform.redis_url}).broker_url)
    assert app.control.inspect(timeout=2).ping()
    app.send_task("infer.echo", kwargs={"inputs": [1]}, queue="echo")
    app.close()


def over(http: httpx.Client, task_id: str) -> bool:
    return http.get(f"/tasks/{task_id}").json()["status"] not in ("queued", "running", "retrying")


def with_socket(platform: Platform) -> None:
    sock = websocket.create_connection(platform.url.replace("http", "ws") + "/ws", timeout=20)
    message = {"type": "submit", "id": 1, "model": "echo", "inputs": {"text": "by socket"}}
    sock.send(json.dumps(message))
    assert json.loads(sock.recv())
    sock.close()


def test_every_key_is_documented_and_bounded(platform: Platform) -> None:
    use_everything(platform)
    with redis.Redis.from_url(platform.redis_url) as client:
        # A message that nobody can read.
        client.xadd("stream:echo:0", {"message": b"nothing"})
        client.lpush("stream:echo:bell", 1)
        wait_until(lambda: client.exists("stream:echo:unreadable"))
        keys = [key.decode() for key in client.scan_iter(count=1000)]
        found: dict[str, set[str]] = {}
        for key in keys:
            kind, bound = row_of(key)
            actual = client.type(key).decode()
            if actual == "none":
                continue  # It has just expired, or was settled.
            assert actual == kind, key
            found.setdefault(bound.split()[0], set()).add(key)
            ttl_s = client.ttl(key)
            if bound.startswith("TTL"):
                assert ttl_s > 0 or not client.exists(key), f"{key} has no time to live"
            else:
                assert bound.startswith(("cap ", "reason: ")), key

    assert found.keys() == {"TTL", "cap", "reason:"}
    for part in (
        "inferno:task:", "celery-task-meta-", "inferno:idempotency:", "inferno:cache:kept:",
        "inferno:statistics:", "inferno:model_state", ":unreadable", ":consumers",
    ):  # fmt: skip
        assert any(part in key for key in keys), part


@pytest.mark.parametrize("name", ["claim_key", "payload_key", "dead_key", "record_key"])
def test_rare_keys_have_a_time_to_live(name: str) -> None:
    kind, bound = row_of(getattr(names, name)("inferno:", str(uuid.uuid4())))

    assert kind in ("string", "hash")
    assert bound.startswith("TTL `INFERNO_TASKS__")


@pytest.mark.parametrize(
    "key",
    ["inferno:surprise", "inferno:task:", "stream:echo:10", "celery", "x", "inferno:dead:x/y"],
)
def test_a_key_that_is_not_documented_is_noticed(key: str) -> None:
    with pytest.raises(AssertionError, match="no row"):
        row_of(key)
