"""Alive, ready, or neither."""

from __future__ import annotations

import pytest


def test_everything_served_is_ok_and_ready(client):
    body = client.get("/health").get_json()
    assert body == {
        "status": "ok",
        "redis": "ok",
        "models": {"digits": True, "sentiment": True, "tokens": True},
        "workers_active": 1,
    }
    assert client.get("/health/ready").status_code == 200


def test_missing_worker_is_degraded_and_not_ready(client, worker):
    worker.serve(sentiment=[2])
    assert client.get("/health").get_json()["status"] == "degraded"
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert response.get_json()["missing"] == ["digits", "tokens"]


@pytest.fixture
def outage(app, monkeypatch):
    def closed(*_, **__):
        raise ConnectionRefusedError

    app.extensions["inferno"].client.connection_pool.disconnect()
    monkeypatch.setattr("redis.connection.Connection._connect", closed)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("outage")
def test_without_redis_only_liveness_is_left(client):
    assert client.get("/health/live").status_code == 200
    response = client.get("/api/v1/health")
    assert response.status_code == 503
    assert response.get_json()["redis"] == "down"
    assert client.get("/health/ready").status_code == 503
