"""Requests that are sent again with the same Idempotency-Key."""

from __future__ import annotations

import threading

import pytest

from inferno import names
from inferno.errors import BrokerUnavailable, ForwardFailed, InvalidRequest
from tasks.intake.submit import Submitter
from tests.integration.web.conftest import with_gateway
from web.calls.idempotency import MAX_LENGTH, parse

NATIVE = {"model": "sentiment", "inputs": {"text": "Good."}}
PREDICT = "/v1/models/sentiment:predict"
BODY = {"inputs": {"text": "Good."}}
KEY = {"Idempotency-Key": '"8e03978e-40d5"'}


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ('"a b"', "a b"),
        (' "a" ', "a"),
        (r'"a\"b\\c"', 'a"b\\c'),
        ('"a,b"', "a,b"),
        ("8e03978e-40d5", "8e03978e-40d5"),
        ("a" * MAX_LENGTH, "a" * MAX_LENGTH),
        ('"' + r"\\" * MAX_LENGTH + '"', "\\" * MAX_LENGTH),
    ],
)
def test_key_is_a_quoted_or_a_bare_string(value, key):
    assert parse(value) == key


@pytest.mark.parametrize(
    "value",
    ["", '""', '"a', 'a"', r'"a\b"', '"a","b"', "a, b", "a b", "ä", '"ä"', "a" * 256, '"a";b=1'],
)
def test_malformed_key_is_refused(value):
    with pytest.raises(InvalidRequest) as refused:
        parse(value)
    assert refused.value.field == "Idempotency-Key"


@pytest.mark.parametrize(("path", "body"), [("/infer", NATIVE), (PREDICT, BODY)])
def test_malformed_key_is_400_and_nothing_is_queued(client, store, worker, path, body):
    before = set(store.scan_iter())
    response = client.post(path, json=body, headers={"Idempotency-Key": '"open'})
    assert response.status_code == 400
    assert response.get_json(force=True)["code"] == "invalid_request"
    assert set(store.scan_iter()) == before


def test_submit_is_done_once_and_answered_twice_alike(client, lane):
    first = client.post("/infer", json=NATIVE, headers=KEY)
    again = client.post("/v1/infer", json=NATIVE, headers={"Idempotency-Key": "8e03978e-40d5"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.get_json() == first.get_json()
    assert again.headers["Location"] == first.headers["Location"]
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert lane("sentiment") == 1


def test_another_key_makes_another_task(client, lane):
    ids = {
        client.post("/infer", json=NATIVE, headers={"Idempotency-Key": key}).json["task_id"]
        for key in ("one", "two")
    }
    assert len(ids) == lane("sentiment") == 2


def test_key_of_another_request_is_422(client, lane, worker):
    client.post("/infer", json=NATIVE, headers=KEY)
    for path, body in (("/infer", NATIVE | {"priority": 1}), (PREDICT, BODY)):
        response = client.post(path, json=body, headers=KEY)
        assert response.status_code == 422
        assert response.get_json(force=True)["code"] == "idempotency_key_reused"
    assert lane("sentiment") == 1


def test_concurrent_first_requests_make_one_task(app, lane):
    answers = []
    together = threading.Barrier(8)

    def call():
        client = app.test_client()
        together.wait()
        answers.append(client.post("/infer", json=NATIVE, headers=KEY))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [202] * 8
    assert len({answer.json["task_id"] for answer in answers}) == 1
    assert sum("Idempotency-Replayed" in answer.headers for answer in answers) == 7
    assert lane("sentiment") == 1


def test_submit_that_waits_is_replayed_with_the_finished_document(client, worker, lane):
    task_id = client.post("/infer", json=NATIVE, headers=KEY).json["task_id"]
    pending = client.post("/infer", json=NATIVE, headers=KEY | {"Prefer": "wait=1"})
    assert pending.status_code == 202
    worker.succeed(task_id)
    done = client.post("/infer", json=NATIVE, headers=KEY | {"Prefer": "wait=20"})
    assert done.status_code == 200
    assert (done.json["task_id"], done.json["status"]) == (task_id, "succeeded")
    assert done.headers["Idempotency-Replayed"] == "true"
    assert lane("sentiment") == 1


def test_submit_that_waits_again_gets_the_outcome_of_the_first(app, client, worker, until):
    task_id = client.post("/infer", json=NATIVE, headers=KEY).json["task_id"]
    answers = []

    def call():
        headers = KEY | {"Prefer": "wait=30"}
        answers.append(app.test_client().post("/infer", json=NATIVE, headers=headers))

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: worker.client.pubsub_channels(names.result_key(task_id)))
    worker.succeed(task_id)
    thread.join(20)
    assert answers[0].status_code == 200
    assert answers[0].json["task_id"] == task_id


def test_predict_in_progress_is_409_and_then_its_outcome(app, worker, until):
    answers = []

    def call():
        answers.append(app.test_client().post(PREDICT, json=BODY, headers=KEY))

    first = threading.Thread(target=call)
    first.start()
    task = worker.published.get(timeout=20)
    client = app.test_client()
    busy = client.post(PREDICT, json=BODY, headers=KEY)
    assert busy.status_code == 409
    problem = busy.get_json(force=True)
    assert (problem["code"], problem["task_id"]) == ("request_in_progress", task.task_id)
    assert int(busy.headers["Retry-After"]) >= 1
    # Who does not want to wait hears which task it is.
    leaving = client.post(PREDICT, json=BODY, headers=KEY | {"Prefer": "respond-async"})
    assert (leaving.status_code, leaving.json["task_id"]) == (202, task.task_id)
    worker.succeed(task.task_id)
    first.join(20)
    again = client.post(PREDICT, json=BODY, headers=KEY)
    assert again.status_code == answers[0].status_code == 200
    assert again.json == answers[0].json
    assert again.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in answers[0].headers


def test_failed_predict_is_replayed_with_its_error_also_without_a_worker(
    client, answering, store, settings
):
    answering.outcome = lambda task: ForwardFailed("it broke")
    first = client.post(PREDICT, json=BODY, headers=KEY)
    answering.cluster.leave("fake@host")
    client.application.extensions["inferno"].cluster._read_at = 0
    again = client.post(PREDICT, json=BODY, headers=KEY)
    assert first.status_code == again.status_code == 500
    assert again.get_json(force=True) == first.get_json(force=True)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert client.post(PREDICT, json=BODY).status_code == 503


def test_replay_says_that_the_result_is_gone(client, answering, store):
    first = client.post(PREDICT, json=BODY, headers=KEY)
    store.delete(names.result_key(first.json["task_id"]))
    assert client.post(PREDICT, json=BODY, headers=KEY).status_code == 410


def test_refused_request_leaves_its_key_free(client, app, worker, monkeypatch):
    assert client.post("/infer", json=NATIVE | {"priority": 99}, headers=KEY).status_code == 422
    assert client.post("/infer", json=NATIVE | {"inputs": {}}, headers=KEY).status_code == 422
    worker.cluster.leave("fake@host")
    assert client.post(PREDICT, json=BODY, headers=KEY).status_code == 503
    accepted = client.post("/infer", json=NATIVE, headers=KEY)
    assert accepted.status_code == 202
    assert "Idempotency-Replayed" not in accepted.headers


def test_broker_that_takes_nothing_leaves_the_key_free(
    client, app, broker, store, settings, monkeypatch
):
    """On brokers that are no streams, the message goes out after the key was written."""
    lists = settings.model_copy(
        update={"broker": settings.broker.model_copy(update={"url": settings.redis_url})}
    )
    submitter = Submitter(broker, store, lists)
    with_gateway(app, submitter=submitter)

    def refuse(message):
        raise BrokerUnavailable("it is away")

    monkeypatch.setattr(submitter._lanes, "send", refuse)
    assert client.post("/infer", json=NATIVE, headers=KEY).status_code == 503
    assert not list(store.scan_iter("inferno:idempotency:*"))
    assert not list(store.scan_iter("inferno:task:*"))
