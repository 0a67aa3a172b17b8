"""Tasks by their id."""

from __future__ import annotations

import threading
import time

import pytest

from inferno import names
from inferno.errors import DeadlineExceeded, ForwardFailed
from inferno.protocol.tasks import TaskState
from tasks.broker.lanes import Held
from tasks.control.deadlines import LATE_S
from tasks.state.transitions import Rider


@pytest.fixture
def task_id(client):
    form = {"model": "sentiment", "inputs": {"text": "Good."}, "priority": 3}
    return client.post("/infer", json=form).get_json()["task_id"]


@pytest.mark.parametrize("route", ["/tasks", "/result", "/v1/tasks", "/api/v1/result"])
def test_pending_task_says_so(client, task_id, route):
    response = client.get(f"{route}/{task_id}")
    body = response.get_json()
    assert response.status_code == 200
    assert response.headers["Retry-After"] == "1"
    assert (body["status"], body["attempts"], body["priority"]) == ("queued", 0, 3)
    assert "outputs" not in body


def test_finished_task_shows_everything(client, worker, task_id):
    worker.succeed(task_id, {"text": {"dtype": "string", "shape": [1], "data": ["ä\n"]}})
    response = client.get(f"/tasks/{task_id}")
    body = response.get_json()
    assert "Retry-After" not in response.headers
    assert body["status"] == "succeeded"
    assert body["outputs"]["text"]["data"] == ["ä\n"]
    assert body["batch"]["flush_reason"] == "idle"
    assert body["worker"] == "fake@host"
    assert body["finished_at"] >= body["accepted_at"]
    assert body["links"]["self"] == f"/tasks/{task_id}"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ForwardFailed("it broke"), TaskState.FAILED),
        (DeadlineExceeded("too late"), TaskState.EXPIRED),
    ],
)
def test_failed_task_shows_its_error(client, worker, task_id, error, state):
    worker.fail(task_id, error, state)
    response = client.get(f"/tasks/{task_id}")
    assert response.status_code == 200
    body = response.get_json()
    assert body["status"] == state
    assert body["error"] == error.problem()


def test_outcome_of_a_task_without_record_is_shown(client, worker, store, settings):
    worker.fail("foreign", DeadlineExceeded("too late"))
    worker.succeed("foreign-too")
    for task_id, state in (("foreign", "expired"), ("foreign-too", "succeeded")):
        store.delete(names.record_key(settings.redis.prefix, task_id))
        assert client.get(f"/tasks/{task_id}").get_json()["status"] == state


def test_unknown_task_is_404(client):
    response = client.get("/tasks/nobody")
    assert response.status_code == 404
    assert response.get_json(force=True)["code"] == "task_not_found"


def test_task_whose_result_is_gone_is_410(client, worker, store, task_id):
    worker.succeed(task_id)
    store.delete(names.result_key(task_id))
    response = client.get(f"/tasks/{task_id}?wait=5")
    assert response.status_code == 410
    assert response.get_json(force=True)["code"] == "result_expired"


def test_long_poll_ends_with_the_task(app, client, worker, task_id, until):
    answers = []
    poll = threading.Thread(
        target=lambda: answers.append(app.test_client().get(f"/tasks/{task_id}?wait=60"))
    )
    poll.start()
    until(lambda: worker.client.pubsub_channels(names.result_key(task_id)))
    worker.succeed(task_id)
    poll.join(10)
    assert answers[0].get_json()["status"] == "succeeded"


def test_long_poll_ends_with_the_client_s_patience(client, task_id):
    response = client.get(f"/tasks/{task_id}?wait=0.05")
    assert response.status_code == 200
    assert response.get_json()["status"] == "queued"


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "1e", ""])
def test_wait_that_is_no_number_is_refused(client, task_id, wait):
    response = client.get(f"/tasks/{task_id}?wait={wait}")
    assert response.status_code == 400
    assert response.get_json(force=True)["field"] == "wait"


def test_task_whose_deadline_passed_without_a_worker_is_expired(client, records, until, lane):
    form = {"model": "sentiment", "inputs": {"text": "Good."}, "timeout_ms": 1}
    task_id = client.post("/infer", json=form).json["task_id"]
    until(lambda: client.get(f"/tasks/{task_id}").json["status"] == "expired")
    body = client.get(f"/tasks/{task_id}").json
    assert body["error"]["code"] == "deadline_exceeded"
    assert body["finished_at"]
    assert lane("sentiment") == 0, "no worker gets it any more"
    assert records.fetch(task_id)[0].state is TaskState.EXPIRED


def test_long_poll_ends_with_the_deadline(client, records):
    form = {"model": "sentiment", "inputs": {"text": "Good."}, "timeout_ms": 300}
    task_id = client.post("/infer", json=form).json["task_id"]
    assert client.get(f"/tasks/{task_id}?wait=60").json["status"] == "expired"
    assert records.fetch(task_id)[0].state is TaskState.EXPIRED


def test_running_task_is_not_late(client, worker, task_id, until):
    form = {"model": "sentiment", "inputs": {"text": "Good."}, "timeout_ms": 1}
    task_id = client.post("/infer", json=form).json["task_id"]
    rider = Rider(task_id, Held(), "sentiment", 2, 0.0, 0)
    worker.transitions.begin([rider], "batch")
    until(lambda: time.time() > worker.records.fetch(task_id)[0].deadline + LATE_S)
    assert client.get(f"/tasks/{task_id}").json["status"] == "running"
