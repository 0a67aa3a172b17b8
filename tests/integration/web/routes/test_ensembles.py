"""Ensembles, as clients see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from inferno.names import stage_task_id
from inferno.protocol.limits import Limits
from inferno.protocol.requests import InferRequest
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import wait_until
from tasks.intake.submit import Submission

TEXTS = {"name": "text", "dtype": "string", "shape": ["batch"]}
SIGNATURE = {"inputs": [TEXTS], "outputs": [TEXTS | {"name": "shout"}]}
STAGES = [
    {"model": "loud", "inputs": {"text": "text"}, "outputs": {"shout": "louder"}},
    {"model": "loud", "name": "again", "inputs": {"text": "louder"}, "outputs": {"shout": "shout"}},
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ensembles")
    kinds: dict[str, dict[str, Any]] = {
        "loud": {"format": "python", "entrypoint": "model:build"},
        "louder": {"format": "ensemble", "ensemble": STAGES},
    }
    for name, fields in kinds.items():
        folder = root / name / "1"
        folder.mkdir(parents=True)
        manifest = {"name": name, "version": 1, "signature": SIGNATURE, **fields}
        (folder / "model.yaml").write_text(yaml.safe_dump(manifest))
    return root


def test_a_predict_is_503_at_once_when_nobody_serves_a_stage(client, worker):
    form = {"inputs": {"text": "Hey."}}
    worker.serve(louder=[1])
    response = client.post("/v1/models/louder:predict", json=form)
    assert response.status_code == 503
    assert response.get_json(force=True)["detail"].startswith("no live worker serves loud;")
    response = client.post("/infer", json=form | {"model": "louder"})
    assert response.status_code == 202, "it waits, as any task"


def test_an_ensemble_is_ready_with_the_workers_of_its_stages(client, worker):
    def told() -> list[tuple[str, bool]]:
        models = client.get("/v1/models").get_json()["models"]
        return [(model["name"], model["ready"]) for model in models]

    worker.serve(louder=[1])
    assert told() == [("loud", False), ("louder", False)]
    assert client.get("/v2/models/louder/ready").status_code == 503
    assert client.get("/health/ready").get_json()["missing"] == ["loud", "louder"]
    worker.serve(louder=[1], loud=[1])
    wait_until(lambda: told() == [("loud", True), ("louder", True)])
    assert client.get("/v2/models/louder/ready").status_code == 200
    assert client.get("/health/ready").status_code == 200


def test_an_ensemble_is_not_ready_when_a_stage_is_out_of_service(app, client, worker):
    def status() -> int:
        return client.get("/v2/models/louder/ready").status_code

    worker.serve(louder=[1], loud=[1])
    wait_until(lambda: status() == 200)
    deployments = app.extensions["inferno"].deployments
    deployments.change("loud", lambda now: replace(now, withdrawn=frozenset({1})))
    try:
        wait_until(lambda: status() == 503)
    finally:
        deployments.change("loud", lambda now: replace(now, withdrawn=frozenset()))


def test_an_ensemble_s_task_shows_its_stages_and_they_show_it(app, client, worker):
    form = {"model": "louder", "inputs": {"text": "Hey."}}
    task_id = client.post("/infer", json=form).get_json()["task_id"]
    assert client.get(f"/tasks/{task_id}").get_json()["stages"] == []
    services = app.extensions["inferno"]
    request = InferRequest(inputs={"text": "Hey."}, model="loud")
    package = services.repository.model("loud").package()
    inputs = request.arrays(package.signature, Limits(100, 100, 100))
    stage_id = stage_task_id(task_id, "loud")
    submission = Submission(request, package, inputs, stage_id, task_id)
    for _ in range(2):
        (accepted,) = services.gateway.submitter.submit_all([submission], "nobody")
        assert accepted.task_id == stage_id
    assert services.control.lanes.backlog("loud").total == 1, "known tasks stay as they are"

    stage = {"name": "loud", "model": "loud", "version": 1, "task_id": stage_id}
    assert client.get(f"/tasks/{task_id}").get_json()["stages"] == [stage | {"status": "queued"}]
    assert client.get(f"/tasks/{stage_id}").get_json()["parent"] == task_id
    worker.succeed(stage_id, model="loud")
    worker.client.delete(f"celery-task-meta-{stage_id}")
    (shown,) = client.get(f"/tasks/{task_id}").get_json()["stages"]
    assert shown["status"] == TaskState.SUCCEEDED
