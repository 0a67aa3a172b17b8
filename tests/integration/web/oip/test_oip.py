"""The Open Inference Protocol's routes, as far as their calls are tasks like any other."""

from __future__ import annotations

import pytest

from inferno import names
from inferno.errors import ForwardFailed

TEXT = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["Good."]}
INFER = "/v2/models/sentiment/infer"
BODY = {"inputs": [TEXT]}
KEY = {"Idempotency-Key": '"8e03978e-40d5"'}


@pytest.fixture(autouse=True)
def outputs(answering):
    """Every task has the outputs that the signature declares."""
    answering.outcome = lambda task: None


@pytest.mark.parametrize("prefer", ["wait=5", "respond-async"])
def test_the_preference_that_was_granted_is_told(client, prefer):
    response = client.post(INFER, json=BODY, headers={"Prefer": prefer})
    assert response.status_code == (202 if prefer == "respond-async" else 200)
    assert response.headers["Preference-Applied"] == prefer


def test_a_replay_is_marked(client):
    first, again = (client.post(INFER, json=BODY, headers=KEY) for _ in range(2))
    assert again.json == first.json
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"


def test_a_failure_is_replayed_as_such(client, answering):
    answering.outcome = lambda task: ForwardFailed("it broke")
    first, again = (client.post(INFER, json=BODY, headers=KEY) for _ in range(2))
    assert first.status_code == again.status_code == 500
    assert first.json["error"] == again.json["error"] == "it broke"
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"


def test_a_replay_says_that_the_result_is_gone(client, store):
    first = client.post(INFER, json=BODY, headers=KEY)
    store.delete(names.result_key(first.json["parameters"]["task_id"]))
    again = client.post(INFER, json=BODY, headers=KEY)
    assert again.status_code == 410
    assert "its result was deleted" in again.json["error"]
