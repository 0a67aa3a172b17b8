"""Whoever can write to Redis can stop the platform, but cannot run code in it.

Each test writes into one kind of key what nobody honest would write. Then nothing of it has run,
worker and front end are alive, and each message has ended where an operator can see it.
"""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from inferno.errors import ForwardFailed
from inferno.settings import Settings
from inferno.testing.processes import wait_until
from tasks.broker.lanes import Lanes
from tasks.state.outcomes import decode_outcome
from tests.integration.conftest import app_client, send

#: More than a worker decompresses.
BOMB_BYTES = 512 << 20


@pytest.fixture
def broker() -> str:
    return "streams"


class Creates:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def message(name: Any = "infer.plain", **changes: Any) -> dict[str, Any]:
    """Return a message as Celery writes it; `changes` replaces its parts."""
    body = json.dumps([[], {"inputs": {"text": "x"}}, {"callbacks": None, "errbacks": None}])
    headers = {"lang": "py", "task": name, "id": "hostile", "root_id": "hostile", "retries": 0}
    properties = {
        "correlation_id": "hostile",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": "plain"},
        "priority": 0,
        "body_encoding": "utf-8",
        "delivery_tag": "hostile",
    }
    whole = {
        "body": body, "content-encoding": "utf-8", "content-type": "application/json",
        "headers": headers | changes.pop("headers", {}),
        "properties": properties | changes.pop("properties", {}),
    }  # fmt: skip
    return whole | changes


def hostile_messages(marker: Path) -> dict[str, bytes]:
    """Return what is written into a lane, by what is wrong with it."""
    pickled = pickle.dumps(Creates(marker))
    in_base64 = base64.b64encode(pickled).decode()
    bomb = zlib.compress(bytes(BOMB_BYTES), 1)
    body = json.dumps([[], {"inputs": {"text": "x"}}, {}])

    def kwargs(**given: Any) -> dict[str, Any]:
        return {"body": json.dumps([[], given, {}])}

    odd: dict[str, dict[str, Any]] = {
        "pickle in base64": message(
            **{"content-type": "application/x-python-serialize", "content-encoding": "binary"},
            body=in_base64, properties={"body_encoding": "base64"},
        ),
        "pickle that is said to be JSON": message(
            body=in_base64, properties={"body_encoding": "base64"}
        ),
        "yaml": message(
            **{"content-type": "application/x-yaml"},
            body=f"!!python/object/apply:builtins.open ['{marker}', 'w']",
        ),
        "no content type": message(**{"content-type": None}, body=in_base64),
        "unknown content encoding": message(**{"content-encoding": "rot13"}),
        "unknown body encoding": message(properties={"body_encoding": "uu"}),
        "zlib bomb": message(
            body=base64.b64encode(bomb).decode(), headers={"compression": "application/x-gzip"},
            properties={"body_encoding": "base64"},
        ),
        "unknown compression": message(headers={"compression": "application/x-nonsense"}),
        "compression of another type": message(headers={"compression": ["zlib"]}),
        "no headers": message(headers={}) | {"headers": None},
        "headers of another type": message() | {"headers": ["task"]},
        "no properties": {"body": body, "headers": {}},
        "properties of another type": message() | {"properties": "x"},
        "no delivery tag": message(properties={"delivery_tag": None}),
        "delivery tag of another type": message(properties={"delivery_tag": {"a": 1}}),
        "delivery info of another type": message(properties={"delivery_info": [1]}),
        "priority of another type": message(properties={"priority": "high"}),
        "priority beyond all": message(properties={"priority": 10**30}),
        "task of another type": message(["infer.plain"]),
        "task that is a number": message(7),
        "task without id": message(headers={"id": None}),
        "id of another type": message(headers={"id": {"a": [1]}}),
        "empty name": message(""),
        "retries of another type": message(headers={"retries": "many"}),
        "retries below zero": message(headers={"retries": -(10**9)}),
        "retries beyond all": message(headers={"retries": 10**9}),
        "eta that is no time": message(headers={"eta": "soon"}),
        "eta of another type": message(headers={"eta": {"now": 1}}),
        "expires that is no time": message(headers={"expires": "never"}),
        "expires of another type": message(headers={"expires": [1]}),
        "time limit": message(headers={"timelimit": ["a", {}]}),
        "reply to": message(properties={"reply_to": {"exchange": []}}),
        "callbacks": message(body=json.dumps([[], {}, {"callbacks": [{"task": "infer.plain"}]}])),
        "chord": message(body=json.dumps([[], {}, {"chord": {"task": "celery.map"}}])),
        "body of another type": message(body=["not", "text"]),
        "body that is a number": message(body=json.dumps(7)),
        "body that is not JSON": message(body="{"),
        "body that is too deep": message(body="[" * 100_000),
        "a type of kombu's": message(
            body='[[], {"inputs": {"__type__": "uuid", "__value__": {"hex": "no"}}}, {}]'
        ),
        "an unknown type": message(
            body='[[], {"x": {"__type__": "os.system", "__value__": 1}}, {}]'
        ),
        "inputs of another type": message(**kwargs(inputs=[1])),
        "version of another type": message(**kwargs(inputs={"text": "x"}, version="../1")),
        "outputs of another type": message(**kwargs(inputs={"text": "x"}, outputs={"a": 1})),
        "codec of another type": message(**kwargs(inputs={"text": "x"}, codec=["pickle"])),
        "unknown codec": message(**kwargs(inputs={"text": "x"}, codec="pickle")),
        "webhook of another type": message(**kwargs(inputs={"text": "x"}, webhook=[1])),
        "webhook to a file": message(**kwargs(inputs={"text": "x"}, webhook={"url": "file:///x"})),
        "a claim of nothing": message(**kwargs(claim={"text": [1]})),
        "a claim of everything": message(**kwargs(claim={"text": [10**9, 10**9]})),
        "a claim of another type": message(**kwargs(claim="os.system")),
        "a shared key of another type": message(**kwargs(inputs={"text": "x"}, cache={"a": 1})),
        "accepted in the future": message(**kwargs(inputs={"text": "x"}, accepted_at=1e300)),
        "old protocol": {
            **message(), "headers": {},
            "body": json.dumps({"task": "infer.plain", "id": "hostile", "args": [], "kwargs": {}}),
        },
    }  # fmt: skip
    for name in (
        "accumulate", "backend_cleanup", "chain", "chord", "chord_unlock", "chunks", "group", "map",
        "starmap",
    ):  # fmt: skip
        odd[f"celery.{name}"] = message(
            f"celery.{name}",
            body=json.dumps([["os.system", {"task": "infer.plain"}], {"result": []}, {}]),
        )
    for name in ("os.system", "webhooks.deliver", "infer.other", "infer.plain\n[CRITICAL] forged"):
        odd[name] = message(name)
    for number, whole in enumerate(odd.values()):
        # Each is a task of its own, unless its id is what is wrong.
        if isinstance(whole.get("headers"), dict) and whole["headers"].get("id") == "hostile":
            whole["headers"]["id"] = f"hostile-{number}"
        properties = whole.get("properties")
        if isinstance(properties, dict) and properties.get("delivery_tag") == "hostile":
            properties["delivery_tag"] = f"hostile-{number}"
    raw = {
        "pickle": pickled,
        "MessagePack": b"\x83\xa4body\xc4\x00\xc1",
        "nothing": b"",
        "bytes": bytes(range(256)),
        "truncated": json.dumps(message()).encode()[:-20],
        "a list": b"[]",
        "a number": b"7",
        "too deep": b"[" * 100_000,
        "too deep with a type": b'{"__type__":' * 100_000,
        "a type of kombu's for all": b'{"__type__": "decimal", "__value__": "x"}',
        "large": b'{"body": "' + b"x" * (20 << 20),
    }
    return raw | {name: json.dumps(whole).encode() for name, whole in odd.items()}


def test_no_message_of_a_lane_runs_code_or_stays(
    repository, start_worker, celery, client, settings, tmp_path
):
    marker = tmp_path / "ran"
    repository.add("plain")
    lane = Lanes(celery, client, settings).key("plain")
    with start_worker("plain") as worker:
        send(celery, "plain", "before").get(timeout=10)
        messages = hostile_messages(marker)
        for name, payload in messages.items():
            client.xadd(f"{lane}:0", {"message": payload})
            client.xadd(f"{lane}:returned", {"message": payload}) if len(payload) < 10**6 else None
            client.lpush(f"{lane}:bell", 1)
            assert worker.poll() is None, name

        wait_until(lambda: not backlog(client, lane), 30)

        assert send(celery, "plain", "after").get(timeout=20)["model"] == "plain"
        assert worker.poll() is None
        assert resident_bytes(worker.pid) < 600 << 20
    assert not marker.exists()
    unreadable = client.xrange(f"{lane}:unreadable")
    assert len(unreadable) >= 15
    assert all(len(fields[b"message"]) <= 65_536 for _, fields in unreadable)


@pytest.fixture
def http(settings: Settings) -> Iterator[FlaskClient]:
    yield from app_client(settings)


GARBAGE = (b"", b"\x80\x04\x95", b"{", b"7", b"[]", b'{"a": 1}', b"null", b"\xff" * 100)


def test_nothing_that_is_stored_runs_code_or_stops_the_platform(
    repository, start_worker, celery, client, settings, http, tmp_path, log
):
    marker = tmp_path / "ran"
    pickled = pickle.dumps(Creates(marker))
    garbage = (*GARBAGE, pickled)
    repository.add("plain")
    with start_worker("plain") as worker:
        send(celery, "plain", "before").get(timeout=10)
        for number, value in enumerate(garbage):
            client.hset("inferno:workers", f"w{number}", value)
            client.hset("inferno:model_state", f"m{number}", value)
            client.hset("inferno:packages", f"p{number}", value)
            client.zadd("inferno:tasks", {f"t{number}": 2e9})
            client.hset(f"inferno:task:t{number}", mapping={"state": value, "model": value})
            client.set(f"celery-task-meta-t{number}", value)
            client.publish("inferno:model_state", value)
            client.publish("inferno:model_state", b"plain/" + value)
            client.publish("inferno:replies:any", value)
            client.publish("/0.celery.pidbox", value)
            client.publish("/0.celeryev/worker.heartbeat", value)
        client.hset("inferno:model_state", "plain", pickled)
        client.set("inferno:task:text", "x")

        for path in ("/health", "/models", "/models/plain", "/tasks", "/lanes", "/"):
            assert http.get(path).status_code == 200, path
        for number in range(len(garbage)):
            answer = http.get(f"/tasks/t{number}")
            assert (answer.status_code, answer.json["code"]) == (500, "state_unreadable")
        body = {"inputs": {"text": "after"}}
        assert http.post("/v1/models/plain:predict", json=body).status_code == 200
        # The worker removes what no worker has written.
        wait_until(lambda: client.hlen("inferno:workers") == 1)
        assert worker.poll() is None
    assert "Exception in thread" not in log.read_text()
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("inferno.errors", "_shortened"),
        ("inferno.errors", "Annotated"),
        ("inferno.errors", "re"),
        ("inferno.errors", "__loader__"),
        ("inferno.errors", "InfernoError.__init__"),
        ("inferno.nowhere", "Error"),
        (None, "eval"),
    ],
)
def test_an_error_is_looked_up_in_a_closed_table(
    module: str | None, name: str, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    stored: dict[str, Any] = {
        "task_id": "a", "status": "FAILURE", "traceback": None, "children": [],
        "result": {
            "exc_module": module, "exc_type": name, "exc_message": [f"open('{marker}', 'w')"]
        },
    }  # fmt: skip

    outcome = decode_outcome(json.dumps(stored).encode())

    assert outcome is not None
    assert type(outcome.error) is ForwardFailed
    assert not marker.exists()


REMOTE_CONTROL = [
    {"method": "pool_restart", "arguments": {"modules": ["this"], "reload": True}},
    {"method": "pool_restart", "arguments": {"modules": ["os"]}},
    {"method": "os.system", "arguments": {"command": "true"}},
    {"method": "rate_limit", "arguments": {"task_name": "infer.plain", "rate_limit": "x"}},
    {"method": "revoke", "arguments": {"task_id": {"a": 1}, "terminate": True, "signal": "KILL"}},
    {"method": "pool_grow", "arguments": {"n": "many"}},
    {"method": "autoscale", "arguments": {"max": 10**9, "min": -1}},
    {"method": "add_consumer", "arguments": {"queue": ["a"], "exchange": 1}},
    {"method": "time_limit", "arguments": {"task_name": "infer.plain", "hard": "x"}},
    {"method": ["list"], "arguments": 7, "destination": 7},
    {"method": "ping", "arguments": {}, "reply_to": "nobody", "ticket": 1},
    {"method": "ping", "pattern": "(", "matcher": "pcre"},
]


def test_remote_control_runs_no_code(repository, start_worker, celery, client):
    repository.add("plain")
    with start_worker("plain") as worker:
        for number, command in enumerate(REMOTE_CONTROL):
            whole = message(
                body=json.dumps(command), headers={"clock": "x", "expires": None},
                properties={"delivery_tag": f"t{number}"},
            )  # fmt: skip
            client.publish("/0.celery.pidbox", json.dumps(whole))
        client.publish("/0.celery.pidbox", json.dumps(message() | {"properties": 7}))

        replies = celery.control.pool_restart(modules=["this"], reload=True, reply=True, timeout=10)

        [answer] = [answer for reply in replies for answer in reply.values()]
        assert "Pool restarts not enabled" in answer["error"]
        assert send(celery, "plain", "after").get(timeout=10)["model"] == "plain"
        assert worker.poll() is None


def backlog(client, lane: str) -> int:
    """Return how many messages a lane holds, waiting, held or delayed."""
    streams = [f"{lane}:{name}" for name in ("returned", *range(10))]
    return sum(map(client.xlen, streams)) + client.zcard(f"{lane}:delayed")


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
