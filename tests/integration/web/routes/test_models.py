"""What can be served, and what is ready."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("route", ["/v1/models", "/models", "/api/v1/models"])
def test_list_serves_every_kind_of_client(client, route):
    body = client.get(route).get_json()
    assert body["object"] == "list"
    assert body["data"] == body["models"]
    sentiment = next(model for model in body["data"] if model["id"] == "sentiment")
    assert sentiment["object"] == "model"
    assert isinstance(sentiment["created"], int)
    assert sentiment["owned_by"]
    assert (sentiment["version"], sentiment["versions"]) == (2, [1, 2])
    assert sentiment["loaded_versions"] == [1, 2]
    assert sentiment["ready"] is True
    assert "broken" in body["broken"]


def test_model_is_not_ready_without_a_ready_worker(client, worker):
    worker.serve(digits=[1])
    ready = {model["name"]: model["ready"] for model in client.get("/v1/models").get_json()["data"]}
    assert ready == {"digits": True, "sentiment": False, "tokens": False}


def test_model_shows_its_signature(client):
    body = client.get("/v1/models/tokens").get_json()
    assert body["signature"]["inputs"][0]["shape"] == ["batch", "n"]
    assert body["batching"] == {
        "max_batch_size": 4,
        "max_batch_delay_ms": 20.0,
        "oversized": "refuse",
    }
    body = client.get("/v1/models/sentiment").get_json()
    assert body["labels"] == ["unkind", "kind"]
    assert body["example"] == {"model": "sentiment", "inputs": {"text": "A sample sentence."}}
    assert body["task"] == "classification"


def test_active_version_is_told(client):
    body = client.get("/v1/models/sentiment/active").get_json()
    assert body == {
        "name": "sentiment",
        "version": 2,
        "loaded": True,
        "shares": {"2": 1.0},
        "follows_latest": True,
    }


@pytest.mark.parametrize("route", ["/v1/models/nobody", "/v1/models/nobody/active"])
def test_unknown_model_is_404(client, route):
    response = client.get(route)
    assert response.status_code == 404
    assert response.mimetype == "application/problem+json"


def test_version_can_be_named_by_a_header(client, answering):
    body = {"inputs": {"text": "x"}}

    def predict(header, **members):
        return client.post(
            "/v1/models/sentiment:predict",
            json=body | members,
            headers={"Inferno-Version": header},
        )

    answering.outcome = lambda task: {
        "version": {"dtype": "int64", "shape": [1], "data": [task.version]}
    }
    assert predict("1").get_json()["outputs"]["version"]["data"] == [1]
    assert predict("1", version=1).get_json()["outputs"]["version"]["data"] == [1]
    assert predict("7").status_code == 404
    for refused in (predict("one"), predict("2", version=1)):
        assert refused.status_code == 400
        assert refused.get_json()["detail"].startswith("Inferno-Version: ")
