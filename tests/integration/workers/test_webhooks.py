"""Webhooks, from a Celery message to a receiver, with a real worker and a real HTTP server."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from inferno.protocol.tasks import BatchInfo, Result, TaskState, Timings
from inferno.testing.processes import wait_until, worker
from tasks.broker.lanes import Held
from tasks.broker.webhook_message import message, message_id
from tasks.results import views as documents
from tasks.state.outcomes import encode_outcome
from tasks.state.records import Record
from tasks.state.transitions import Step, Transitions
from tests.integration.conftest import accept, send
from tests.receiver import Received, Receiver, hostile_receiver, receiver
from tests.unit.test_docs import documented_verify

SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX"
KEY = bytes(range(24))

Publish = Callable[..., str]


@pytest.fixture
def here() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


@pytest.fixture
def webhooks_env(env: dict[str, str]) -> dict[str, str]:
    """Settings that allow webhooks to this machine, with short delays."""
    return env | {
        "INFERNO_WEBHOOKS__SECRET": SECRET,
        "INFERNO_WEBHOOKS__ALLOW_PRIVATE": "true",
        "INFERNO_WEBHOOKS__MAX_RETRIES": "2",
        "INFERNO_WEBHOOKS__BACKOFF_S": "1",
        "INFERNO_WEBHOOKS__MAX_BACKOFF_S": "1",
    }


@pytest.fixture
def publish(celery: Any) -> Publish:
    """Publish a webhook as any Celery client would."""

    def publish(
        url: str,
        task_id: str,
        event: str = "completed",
        occurred_at: float | None = 1_700_000_000.25,
    ) -> str:
        sent = message(url, task_id, event, "m", 1, occurred_at)
        celery.send_task(sent.name, kwargs=sent.kwargs, queue=sent.queue)
        return message_id(task_id, event)

    return publish


def finish(transitions: Transitions, task_id: str, state: TaskState = TaskState.SUCCEEDED) -> None:
    """Store a finished task."""
    record = Record(task_id, "m", 1, TaskState.QUEUED, time.time(), priority=3)
    accept(transitions, record, "", "")
    result = Result(
        {"y": 1.5}, "m", 1, Timings(1, 2, 3, 6), BatchInfo("b", 1, 1, "idle", 2.5, 3.0), "w@test"
    )
    payload = encode_outcome(task_id, msgspec.json.encode(result))
    transitions.finish(
        [Step(task_id, Held(), transitions.commands.ended({}, task_id, state, payload))]
    )


def test_a_webhook_is_tried_again_until_it_is_taken(
    here: Receiver, webhooks_env, transitions, publish, log: Path
) -> None:
    finish(transitions, "hook-1")
    here.statuses["/hook?key=TOKEN"] = [500, 429, 204]
    with worker("webhooks", webhooks_env, log):
        publish(here.url("/hook?key=TOKEN"), "hook-1")
        wait_until(lambda: len(here.received) == 3)
    verify = documented_verify()
    for request in here.received:
        # Each attempt is signed anew, under the same id.
        verify(KEY, request.headers, request.body)
        assert request.headers["webhook-id"] == "hook-1.completed"
        assert request.headers["content-type"] == "application/json"
    body = json.loads(here.received[-1].body)
    assert body["type"] == "task.completed"
    assert body["timestamp"] == "2023-11-14T22:13:20.250+00:00"
    assert body["data"]["task_id"] == "hook-1"
    assert body["data"]["status"] == "succeeded"
    assert body["data"]["outputs"] == {"y": 1.5}
    assert body["data"]["priority"] == 3
    assert "given up" not in log.read_text()
    # Addresses and contents may be secret.
    assert "TOKEN" not in log.read_text()
    assert "outputs" not in log.read_text()


def test_a_webhook_without_a_time_says_when_its_task_ended(
    here: Receiver, webhooks_env, transitions, records, publish, log: Path
) -> None:
    finish(transitions, "hook-2")
    with worker("webhooks", webhooks_env, log):
        publish(here.url("/hook"), "hook-2", occurred_at=None)
        wait_until(lambda: here.received)
    record, _ = records.fetch("hook-2")
    assert json.loads(here.received[0].body)["timestamp"] == documents.time(record.finished_at)


def test_what_cannot_be_delivered_is_given_up_with_one_warning(
    here: Receiver, webhooks_env, publish, log: Path
) -> None:
    here.statuses = {"/gone": [410, 200], "/moved": [307], "/broken": [503]}
    here.location = here.url("/private")
    with worker("webhooks", webhooks_env, log):
        gone = publish(here.url("/gone"), "gone-1")
        moved = publish(here.url("/moved"), "moved-1", "start")
        broken = publish(here.url("/broken"), "broken-1")
        form = publish("ftp://a.example", "form-1")
        publish(here.url("/forged?key=TOKEN"), "1\r\nx-forged: yes")
        wait_until(lambda: log.read_text().count("given up") == 5)
        # The worker keeps running.
        publish(here.url("/good"), "good-1")
        wait_until(lambda: here.at("/good"))
    text = log.read_text()
    assert f"given up after try 1: {gone}: http://127.0.0.1:{here.port} answered 410 Gone" in text
    assert f"given up after try 3: {moved}: http://127.0.0.1:{here.port} answered 307" in text
    assert f"given up after try 3: {broken}: http://127.0.0.1:{here.port} answered 503" in text
    assert f"given up after try 1: {form}: webhook: expected a URL that begins" in text
    assert re.search(r"given up after try 1: \S+: the message cannot be read", text)
    assert text.count("WARNING") == text.count("given up") == 5
    assert "TOKEN" not in text
    assert here.at("/forged?key=TOKEN") == []
    assert "Traceback" not in text
    assert [len(here.at(path)) for path in ("/gone", "/moved", "/broken")] == [1, 3, 3]
    assert here.at("/private") == []


def test_private_addresses_are_not_called_unless_allowed(
    here: Receiver, env, publish, log: Path
) -> None:
    with worker("webhooks", env, log):
        publish(here.url("/", "localhost"), "private-1")
        publish(here.url("/"), "private-2")
        wait_until(lambda: log.read_text().count("given up after try 1") == 2)
    assert here.received == []


def test_without_a_secret_nothing_is_signed_and_little_is_said_of_a_task_that_is_forgotten(
    here: Receiver, env, publish, log: Path
) -> None:
    with worker("webhooks", env | {"INFERNO_WEBHOOKS__ALLOW_PRIVATE": "true"}, log):
        publish(here.url("/"), "forgotten-1", "start")
        wait_until(lambda: here.received)
    (request,) = here.received
    assert isinstance(request, Received)
    assert "webhook-signature" not in request.headers
    body = json.loads(request.body)
    assert body["type"] == "task.started"
    assert body["data"].items() >= {"task_id": "forgotten-1", "model": "m", "version": 1}.items()
    assert "outputs" not in body["data"]


def test_a_worker_of_webhooks_loads_no_model(
    here: Receiver, repository, webhooks_env, celery, publish, log: Path
) -> None:
    repository.add("unloaded")
    waiting = send(celery, "unloaded", "x")
    with worker("webhooks", webhooks_env, log) as popen:
        publish(here.url("/"), "light-1")
        wait_until(lambda: here.received)
        maps = Path(f"/proc/{popen.pid}/maps").read_text()
    assert "/torch/" not in maps
    assert "/onnxruntime/" not in maps
    assert repository.ledger.read_text() == ""
    assert not waiting.ready()
    waiting.forget()


def test_a_silent_receiver_delays_only_itself_and_loses_nothing(
    here: Receiver, webhooks_env, publish, log: Path
) -> None:
    answers, calls, most = threading.Event(), [], []

    def wait(connection: socket.socket, done: threading.Event) -> None:
        calls.append(connection)
        most.append(sum(call.fileno() >= 0 for call in calls))
        answers.wait(60)
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        taken.append(connection)

    taken: list[socket.socket] = []
    env = webhooks_env | {"INFERNO_WEBHOOKS__TIMEOUT_S": "60", "INFERNO_WEBHOOKS__PER_HOST": "2"}
    with worker("webhooks", env, log, "-c", "8"), hostile_receiver(wait) as silent:
        for number in range(30):
            publish(f"http://{silent}/", f"silent-{number}")
        publish(here.url("/good"), "good")
        wait_until(lambda: here.at("/good"), 15)
        assert not taken
        assert max(most) <= 2
        answers.set()
        wait_until(lambda: len(taken) == 30)
    assert "given up" not in log.read_text()
