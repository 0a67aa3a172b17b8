"""Tasks that could not start in time are refused, with a worker whose model takes its time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery
from flask.testing import FlaskClient

from inferno.settings import Settings
from inferno.testing.processes import wait_until
from tests.integration.conftest import Repository, app_client


@pytest.fixture
def slow(repository: Repository) -> None:
    """A model that runs one task at a time."""
    repository.add("slow", batching={"max_batch_size": 1})


@pytest.fixture
def web(settings: Settings, celery: Celery, slow: None) -> Iterator[FlaskClient]:
    """The web tier, in this process."""
    yield from app_client(settings)


@pytest.fixture
def tolerant(settings: Settings, celery: Celery, slow: None) -> Iterator[FlaskClient]:
    """The web tier that refuses nobody."""
    tasks = settings.tasks.model_copy(update={"refuse_hopeless": False})
    yield from app_client(settings.model_copy(update={"tasks": tasks}))


KEY = {"Idempotency-Key": "late"}


def submit(web: FlaskClient, text: str, headers: dict[str, str] | None = None, **options):
    body = {"model": "slow", "inputs": {"text": text}, **options}
    return web.post("/infer", json=body, headers=headers)


def test_what_could_not_start_in_time_is_refused(web, tolerant, repository, start_worker, client):
    gate = repository.root.parent / "gate"
    here = web.application.extensions["inferno"]
    with start_worker("slow"):
        # Nothing is known of its pace yet.
        assert here.cluster.speed("slow") is None
        first = submit(web, "sleep:0.5", timeout_ms=60_000).json["task_id"]
        assert web.get(f"/tasks/{first}?wait=30").json["status"] == "succeeded"
        wait_until(lambda: here.cluster.speed("slow"))
        assert 0 < here.cluster.speed("slow").tasks_per_s <= 2
        # Alone, it can start whatever its deadline says.
        alone = submit(web, f"hold:{gate}", timeout_ms=20_000)
        assert alone.status_code == 202
        for _ in range(20):
            assert submit(web, "sleep:0").status_code == 202

        keys = set(client.scan_iter())
        refused = submit(web, "late", KEY, timeout_ms=2000)
        assert refused.status_code == 429
        problem = refused.get_json(force=True)
        assert (problem["code"], problem["field"]) == ("overloaded", "timeout_ms")
        # 21 tasks at 2 in a second at most, of which one costs nothing.
        assert int(refused.headers["Retry-After"]) >= 8
        assert set(client.scan_iter()) == keys
        predict = web.post(
            "/v1/models/slow:predict", json={"inputs": {"text": "late"}, "timeout_ms": 2000}
        )
        assert predict.status_code == 429

        # The refused request has left its key free.
        assert submit(web, "late", KEY, timeout_ms=600_000).status_code == 202
        # More time, more urgency, no deadline, or an operator who wants it so.
        assert submit(web, "patient", timeout_ms=600_000).status_code == 202
        assert submit(web, "urgent", timeout_ms=2000, priority=9).status_code == 202
        assert submit(web, "whenever").status_code == 202
        assert submit(tolerant, "hopeless", timeout_ms=2000).status_code == 202
        gate.touch()
