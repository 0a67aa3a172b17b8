"""Cancelling, listing and retrying tasks; dead letters; lanes."""

from __future__ import annotations

import threading
import time

import numpy as np
import orjson
import pytest

from inferno import names
from inferno.errors import ForwardFailed
from inferno.protocol import packing
from inferno.protocol.tasks import TaskState
from tasks.broker.lanes import Held
from tasks.state.listing import CHUNK, CHUNKS
from tasks.state.transitions import Rider, Step

FORM = {"model": "sentiment", "inputs": {"text": "Good."}}


@pytest.fixture
def submit(client):
    """Submits to a model and returns the task's id."""

    def submit(model="sentiment", **members):
        inputs = {"tokens": [[1]], "mask": [[1]]} if model == "tokens" else {"text": "Good."}
        form = {"model": model, "inputs": inputs, **members}
        return client.post("/infer", json=form).get_json()["task_id"]

    return submit


def run(worker, task_id, batch_id="b-1"):
    """Let the forward pass of a task begin."""
    worker.transitions.begin(
        [Rider(task_id, Held(), "sentiment", 2, time.time(), 0)], batch_id=batch_id
    )


def postpone(worker, task_id):
    commands = worker.transitions.commands.retried(task_id, 1, 4_000_000_000.0)
    worker.transitions.finish([Step(task_id, Held(), commands)])


def bury(worker, task_id, model="sentiment", payload=None):
    """Leave a dead letter as a worker does."""
    fields = {
        "model": model,
        "version": 2,
        "priority": 3,
        "code": "forward_failed",
        "error": "it broke",
        "traceback": "Traceback: it broke",
        "batch_id": "b-1",
        "retries": 1,
        "accepted_at": time.time(),
        "died_at": time.time(),
        "payload": orjson.dumps(payload or {"inputs": {"text": "Good."}, "version": 2}),
    }
    commands = worker.transitions.commands.buried(task_id, fields)
    worker.transitions.finish([Step(task_id, Held(), commands)])


def problem(response):
    assert response.mimetype == "application/problem+json"
    return response.get_json(force=True)


# -- Cancelling


@pytest.mark.parametrize("prefix", ["", "/v1", "/api/v1"])
def test_waiting_task_is_cancelled(client, submit, prefix):
    task_id = submit()
    for _ in range(2):
        response = client.delete(f"{prefix}/tasks/{task_id}")
        assert response.status_code == 200
        body = response.get_json()
        assert (body["task_id"], body["status"]) == (task_id, "cancelled")
        assert body["error"]["code"] == "task_cancelled"
    assert client.get("/lanes/sentiment").get_json()["waiting"] == 0


@pytest.mark.parametrize("before", [run, postpone], ids=["running", "retrying"])
def test_task_is_cancelled_in_every_state(client, worker, submit, before):
    task_id = submit()
    before(worker, task_id)
    assert client.delete(f"/tasks/{task_id}").get_json()["status"] == "cancelled"
    # What its worker says later changes nothing.
    worker.succeed(task_id)
    assert client.get(f"/tasks/{task_id}").get_json()["status"] == "cancelled"


def test_task_that_is_over_cannot_be_cancelled(client, worker, submit):
    task_id = submit()
    worker.succeed(task_id)
    response = client.delete(f"/tasks/{task_id}")
    assert response.status_code == 409
    assert problem(response)["code"] == "wrong_state"
    assert client.get(f"/tasks/{task_id}").get_json()["status"] == "succeeded"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("DELETE", "/tasks/nobody", "task_not_found"),
        ("POST", "/tasks/nobody/retry", "task_not_found"),
        ("GET", "/dead/nobody", "task_not_found"),
        ("DELETE", "/dead/nobody", "task_not_found"),
        ("POST", "/dead/nobody/replay", "task_not_found"),
        ("GET", "/lanes/nobody", "model_not_found"),
        ("POST", "/lanes/nobody/pause", "model_not_found"),
        ("POST", "/lanes/nobody/resume", "model_not_found"),
        ("POST", "/lanes/nobody/purge?confirm=0", "model_not_found"),
    ],
)
def test_what_is_unknown_is_404(client, method, path, code):
    response = client.open(path, method=method)
    assert response.status_code == 404
    assert problem(response)["code"] == code


def test_waiting_caller_is_told_of_the_cancellation(app, client, worker, until):
    answers = []

    def call():
        body = {"inputs": {"text": "Good."}}
        answers.append(app.test_client().post("/v1/models/sentiment:predict", json=body))

    caller = threading.Thread(target=call)
    caller.start()
    task_id = until(lambda: worker.published.get(timeout=10)).task_id
    client.delete(f"/tasks/{task_id}")
    caller.join(10)
    assert answers[0].status_code == 409
    assert problem(answers[0])["code"] == "task_cancelled"
    assert problem(answers[0])["task_id"] == task_id


def test_cancelled_task_without_record_stays_cancelled(client, store, settings, submit):
    task_id = submit()
    client.delete(f"/tasks/{task_id}")
    store.delete(names.record_key(settings.redis.prefix, task_id))
    assert client.get(f"/tasks/{task_id}").get_json()["status"] == "cancelled"


# -- The document of a task


def test_document_of_a_task_shows_what_happened_to_it(client, worker, submit):
    task_id = submit()
    fresh = client.get(f"/tasks/{task_id}").get_json()
    assert (fresh["attempts"], fresh["retries"]) == (0, 0)
    assert not fresh.keys() & {"retry_at", "batch_id", "replay_of"}
    run(worker, task_id)
    postpone(worker, task_id)
    waiting = client.get(f"/tasks/{task_id}").get_json()
    assert (waiting["attempts"], waiting["retries"]) == (1, 1)
    assert (waiting["batch_id"], waiting["retry_at"]) == ("b-1", "2096-10-02T07:06:40.000+00:00")
    worker.succeed(task_id)
    assert "retry_at" not in client.get(f"/tasks/{task_id}").get_json()


# -- Listing


def listed(client, query=""):
    body = client.get(f"/tasks?{query}").get_json()
    return [task["task_id"] for task in body["tasks"]], body["next"]


def test_tasks_are_listed_newest_first(client, submit):
    ids = [submit() for _ in range(3)]
    assert listed(client) == (ids[::-1], None)
    (task, *_) = client.get("/v1/tasks?limit=1").get_json()["tasks"]
    assert task["task_id"] == ids[-1]
    assert (task["model"], task["version"], task["status"]) == ("sentiment", 2, "queued")
    assert task["links"]["self"] == f"/tasks/{ids[-1]}"
    assert "outputs" not in task


def test_pages_stay_where_they_are_while_tasks_arrive(client, submit):
    ids = [submit() for _ in range(5)][::-1]
    seen, cursor = listed(client, "limit=2")
    while cursor is not None:
        submit()
        page, cursor = listed(client, f"limit=2&cursor={cursor}")
        seen += page
    assert seen == ids


def test_tasks_of_the_same_moment_are_each_listed_once(client, store, settings, submit):
    ids = sorted((submit() for _ in range(5)), reverse=True)
    store.zadd(names.index_key(settings.redis.prefix), dict.fromkeys(ids, 1_700_000_000.1))
    seen, cursor = listed(client, "limit=1")
    while cursor is not None:
        page, cursor = listed(client, f"limit=1&cursor={cursor}")
        seen += page
    assert seen == ids


def test_tasks_are_chosen_by_state_and_model(client, worker, submit):
    queued, done, failed, other = submit(), submit(), submit(), submit("tokens")
    worker.succeed(done)
    worker.fail(failed, ForwardFailed("it broke"))
    assert listed(client, "status=queued")[0] == [other, queued]
    assert listed(client, "status=queued&model=sentiment")[0] == [queued]
    assert listed(client, "status=succeeded,failed")[0] == [failed, done]
    assert listed(client, "status=succeeded&status=failed")[0] == [failed, done]
    assert listed(client, "model=nobody")[0] == []


def test_page_looks_at_a_bounded_number_of_tasks(client, store, settings, submit):
    rare = submit("tokens")
    now = time.time()
    forgotten = {f"old-{n}": now + 1 + n for n in range(CHUNK * CHUNKS)}
    store.zadd(names.index_key(settings.redis.prefix), forgotten)
    page, cursor = listed(client, "model=tokens")
    assert page == []
    assert listed(client, f"model=tokens&cursor={cursor}") == ([rare], None)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("status=done", "status"),
        ("status=", "status"),
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=-1", "limit"),
        ("limit=many", "limit"),
        ("cursor=", "cursor"),
        ("cursor=%C3%A4", "cursor"),
        ("cursor=bmFuIHg=", "cursor"),
    ],
)
def test_bad_parameter_of_a_list_is_named(client, query, field):
    response = client.get(f"/tasks?{query}")
    assert response.status_code == 400
    assert problem(response)["field"] == field


# -- Retrying


def test_finished_task_is_retried_as_a_new_one(client, worker, store, settings, submit):
    task_id = submit(priority=3)
    worker.fail(task_id, ForwardFailed("it broke"))
    payload = orjson.dumps({"inputs": {"text": "Good."}, "version": 2})
    store.set(names.payload_key(settings.redis.prefix, task_id), payload)
    response = client.post(f"/tasks/{task_id}/retry")
    body = response.get_json()
    assert response.status_code == 202
    assert response.headers["Location"] == f"/tasks/{body['task_id']}"
    assert (body["status"], body["replay_of"]) == ("queued", task_id)
    again = client.get(f"/tasks/{body['task_id']}").get_json()
    assert (again["replay_of"], again["priority"]) == (task_id, 3)
    assert client.get(f"/tasks/{task_id}").get_json()["status"] == "failed"


def test_task_whose_model_is_gone_cannot_be_retried(client, worker, submit, store, settings):
    task_id = submit()
    worker.fail(task_id, ForwardFailed("it broke"))
    store.hset(names.record_key(settings.redis.prefix, task_id), "model", "gone")
    response = client.post(f"/tasks/{task_id}/retry")
    assert response.status_code == 404
    assert problem(response)["code"] == "model_not_found"


def test_task_under_way_cannot_be_retried(client, submit):
    response = client.post(f"/tasks/{submit()}/retry")
    assert response.status_code == 409
    assert problem(response)["code"] == "wrong_state"


def test_task_whose_payload_is_gone_cannot_be_retried(client, worker, submit):
    task_id = submit()
    worker.succeed(task_id)
    response = client.post(f"/tasks/{task_id}/retry")
    assert response.status_code == 410
    assert problem(response)["code"] == "payload_gone"


class TestKeptPayloads:
    @pytest.fixture
    def settings(self, settings):
        kept = settings.tasks.model_copy(update={"keep_payloads": "failed"})
        return settings.model_copy(update={"tasks": kept})

    def test_cancelled_task_can_be_retried(self, client, submit):
        task_id = submit()
        client.delete(f"/tasks/{task_id}")
        again = client.post(f"/tasks/{task_id}/retry")
        assert again.status_code == 202
        assert client.get(f"/tasks/{again.get_json()['task_id']}").get_json()["version"] == 2


# -- Dead letters


def test_dead_letters_are_listed_and_shown(client, worker):
    for n in range(3):
        bury(worker, f"dead-{n}", "tokens" if n == 1 else "sentiment")
    body = client.get("/dead?limit=2").get_json()
    assert [letter["task_id"] for letter in body["dead"]] == ["dead-2", "dead-1"]
    assert body["count"] == 3
    rest = client.get(f"/dead?cursor={body['next']}").get_json()
    assert [letter["task_id"] for letter in rest["dead"]] == ["dead-0"]
    assert rest["next"] is None
    chosen = client.get("/dead?model=tokens").get_json()["dead"]
    assert [letter["task_id"] for letter in chosen] == ["dead-1"]
    letter = client.get("/api/v1/dead/dead-0").get_json()
    assert letter["error"] == {"code": "forward_failed", "detail": "it broke"}
    assert letter["traceback"] == "Traceback: it broke"
    assert letter["payload"] == {"inputs": {"text": "Good."}, "version": 2}
    assert (letter["batch_id"], letter["retries"], letter["version"]) == ("b-1", 1, 2)


def test_dead_letter_is_replayed_once(client, worker):
    bury(worker, "dead-1")
    response = client.post("/dead/dead-1/replay")
    assert response.status_code == 202
    again = client.get(response.headers["Location"]).get_json()
    assert (again["status"], again["replay_of"], again["priority"]) == ("queued", "dead-1", 3)
    assert client.post("/dead/dead-1/replay").status_code == 404
    assert client.get("/dead").get_json()["dead"] == []


def test_dead_letter_whose_model_is_gone_is_kept(client, worker):
    bury(worker, "dead-1", "gone")
    response = client.post("/dead/dead-1/replay")
    assert response.status_code == 404
    assert problem(response)["code"] == "model_not_found"
    assert client.post("/dead/replay").get_json() == {"replayed": 0, "left": 1, "tasks": []}
    assert client.get("/dead").get_json()["count"] == 1


def test_dead_letter_is_shown_and_replayed_with_inputs_that_were_not_in_its_message(
    client, worker, store, settings
):
    inputs = np.array(["Good."], dtype=object)
    for task_id in ("dead-1", "dead-2"):
        bury(worker, task_id, payload={"claim": {"text": [1]}, "version": 2})
    key = names.claim_key(settings.redis.prefix, "dead-1")
    store.set(key, packing.pack({"text": inputs}))
    tensor = {"dtype": "string", "shape": [1], "data": ["Good."]}
    payload = {"inputs": {"text": tensor}, "version": 2}
    assert client.get("/dead/dead-1").get_json()["payload"] == payload
    # Those of the other one are gone.
    assert problem(client.post("/dead/dead-2/replay"))["code"] == "payload_gone"
    body = client.post("/dead/replay").get_json()
    assert (body["replayed"], body["left"]) == (1, 1)
    again = names.claim_key(settings.redis.prefix, body["tasks"][0]["task_id"])
    assert packing.unpack(store.get(again))["text"].tolist() == ["Good."]
    assert not store.exists(key)


@pytest.mark.parametrize(("query", "replayed"), [("", 3), ("?model=sentiment", 2)])
def test_dead_letters_are_replayed_together(client, worker, query, replayed):
    for n in range(3):
        bury(worker, f"dead-{n}", "sentiment" if n else "tokens")
    body = client.post(f"/dead/replay{query}").get_json()
    assert body["replayed"] == len(body["tasks"]) == replayed
    for task in body["tasks"]:
        again = client.get(f"/tasks/{task['task_id']}").get_json()
        assert again["replay_of"] == task["replay_of"]
    assert client.get("/dead").get_json()["count"] == 3 - replayed


def test_dead_letter_is_discarded(client, worker):
    bury(worker, "dead-1")
    assert client.delete("/dead/dead-1").get_json() == {"discarded": 1}
    assert client.get("/dead").get_json() == {"dead": [], "count": 0, "next": None}


@pytest.mark.parametrize("confirm", ["", "?confirm=1", "?confirm=3"])
def test_dead_letters_are_discarded_together_only_when_their_number_is_said(
    client, worker, confirm
):
    bury(worker, "dead-1")
    bury(worker, "dead-2")
    response = client.delete(f"/dead{confirm}")
    assert response.status_code == 409
    assert problem(response)["code"] == "not_confirmed"
    assert problem(response)["detail"].startswith("2 dead letters")
    assert client.delete("/dead?confirm=2").get_json() == {"discarded": 2}
    assert client.delete("/dead?confirm=0").get_json() == {"discarded": 0}


@pytest.mark.parametrize("path", ["/dead", "/lanes/sentiment/purge"])
@pytest.mark.parametrize("confirm", ["", "all", "-1", "1.5"])
def test_confirmation_that_is_no_number_is_refused(client, path, confirm):
    method = "DELETE" if path == "/dead" else "POST"
    response = client.open(f"{path}?confirm={confirm}", method=method)
    assert response.status_code == 400
    assert problem(response)["field"] == "confirm"


# -- Lanes


def test_lanes_tell_what_is_in_them(client, submit):
    submit(), submit()
    lanes = client.get("/lanes").get_json()["lanes"]
    assert {lane["model"]: lane["waiting"] for lane in lanes} == {
        "digits": 0,
        "sentiment": 2,
        "tokens": 0,
    }
    assert client.get("/v1/lanes/sentiment").get_json() == {
        "model": "sentiment",
        "waiting": 2,
        "held": 0,
        "delayed": 0,
        "paused": False,
    }


def test_lane_is_paused_and_resumed(client, submit):
    assert client.post("/lanes/sentiment/pause").get_json()["paused"] is True
    assert client.get("/lanes/tokens").get_json()["paused"] is False
    submit()
    assert client.get("/lanes/sentiment").get_json()["waiting"] == 1
    assert client.post("/lanes/sentiment/resume").get_json()["paused"] is False


def test_lane_is_purged_only_when_the_number_is_said(client, submit):
    ids, other = [submit() for _ in range(3)], submit("tokens")
    for confirm in ("", "?confirm=2"):
        response = client.post(f"/lanes/sentiment/purge{confirm}")
        assert response.status_code == 409
        assert problem(response)["detail"].startswith("3 tasks of sentiment")
    response = client.post("/lanes/sentiment/purge?confirm=3")
    assert response.get_json() == {"model": "sentiment", "cancelled": 3}
    assert {client.get(f"/tasks/{task_id}").get_json()["status"] for task_id in ids} == {
        TaskState.CANCELLED
    }
    assert client.get(f"/tasks/{other}").get_json()["status"] == "queued"
    assert client.get("/lanes/sentiment").get_json()["waiting"] == 0


class TestOtherBroker:
    @pytest.fixture
    def settings(self, settings, redis_url):
        return settings.model_copy(
            update={"broker": settings.broker.model_copy(update={"url": redis_url})}
        )

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/lanes"),
            ("GET", "/lanes/sentiment"),
            ("POST", "/lanes/sentiment/pause"),
            ("POST", "/lanes/sentiment/resume"),
            ("POST", "/lanes/sentiment/purge?confirm=0"),
        ],
    )
    def test_what_it_cannot_do_is_501(self, client, method, path):
        response = client.open(path, method=method)
        assert response.status_code == 501
        assert problem(response)["code"] == "not_supported"
