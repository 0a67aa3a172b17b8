"""Versions of a model that come, take over, share the work and go, in real workers."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import redis
from celery import Celery
from flask.testing import FlaskClient

from inferno import names
from inferno.settings import Settings
from inferno.testing.processes import wait_until
from tests.integration.conftest import Repository, app_client, send

#: A model that says which version it is; its artifact decides whether it can be loaded.
CODE = """
import pathlib
import numpy as np

def build(context):
    version = (context.path / "artifact.txt").read_text()
    assert version != "corrupt", "this artifact is corrupt"
    return lambda inputs: {"version": np.full(len(inputs["text"]), int(version))}
"""
SIGNATURE = {
    "inputs": [{"name": "text", "dtype": "string", "shape": ["batch"]}],
    "outputs": [{"name": "version", "dtype": "int64", "shape": ["batch"]}],
}


def add(repository: Repository, version: int, artifact: str = "") -> None:
    """Add a version of `m` as a careful operator does: it appears when it is complete."""
    hidden = Repository(repository.root / ".incoming")
    hidden.add("m", version, CODE, signature=SIGNATURE)
    folder = hidden.root / "m" / str(version)
    (folder / "artifact.txt").write_text(artifact or str(version))
    (repository.root / "m").mkdir(exist_ok=True)
    folder.rename(repository.root / "m" / str(version))


@pytest.fixture
def repository(repository: Repository, client: redis.Redis, settings: Settings) -> Repository:
    """It has version 1, and nothing is known of what was wanted before."""
    client.delete(names.deployments_key(settings.redis.prefix))
    add(repository, 1)
    return repository


@pytest.fixture
def env(env: dict[str, str]) -> dict[str, str]:
    return env | {
        "INFERNO_REPOSITORY__PRELOAD": "active",
        "INFERNO_REPOSITORY__RECONCILE_INTERVAL_S": "0.2",
    }


@pytest.fixture
def settings(settings: Settings) -> Settings:
    repository = settings.repository.model_copy(update={"load_timeout_s": 20.0})
    return settings.model_copy(update={"repository": repository})


@pytest.fixture
def web(settings: Settings, celery: Celery, repository: Repository) -> Iterator[FlaskClient]:
    """The web tier, in this process."""
    yield from app_client(settings)


@pytest.fixture
def other_web(settings: Settings, celery: Celery, repository: Repository) -> Iterator[FlaskClient]:
    """Another process of the web tier, as far as the models are concerned."""
    yield from app_client(settings)


def answer(web: FlaskClient, **options: Any) -> int:
    """Return the version that answers a predict."""
    response = web.post("/v1/models/m:predict", json={"inputs": {"text": "x"}}, **options)
    document: Any = response.json
    assert response.status_code == 200, document
    (version,) = document["outputs"]["version"]["data"]
    assert version == document["version"]
    return int(version)


def loaded(web: FlaskClient) -> Any:
    document: Any = web.get("/models/m").json
    return document["loaded_versions"]


def load(web: FlaskClient, version: int, **options: Any) -> Any:
    return web.post("/v1/models:load", json={"name": "m", "version": version, **options})


def test_versions_come_take_over_share_the_work_and_go(repository, web, other_web, start_worker):
    with start_worker("m"):
        assert answer(web) == answer(other_web) == 1

        # A newer one is found, loaded and put into service; the older one goes.
        add(repository, 2)
        wait_until(lambda: answer(web) == 2)
        wait_until(lambda: loaded(web) == [2])

        # What is wanted is true everywhere when the call returns.
        answered = load(web, 1)
        assert answered.json["loaded"] is True
        assert answered.json["active"] == 1
        (worker,) = answered.json["workers"]
        assert worker["state"] == "ready"
        assert len(worker["digest"]) == 16
        assert answer(other_web) == answer(web) == 1
        assert web.get("/models/m/active").json == {
            "name": "m",
            "version": 1,
            "loaded": True,
            "shares": {"1": 1.0},
            "follows_latest": False,
        }

        # A version that was chosen by its number is not replaced by a newer one.
        add(repository, 3)
        assert load(web, 3, activate=False).status_code == 200
        assert answer(web) == 1
        assert answer(web, headers={"Inferno-Version": "3"}) == 3

        # Several share the work; a key sticks to its version, in every process.
        shared = web.put("/v1/models/m/active", json={"weights": {"1": 3, "2": 1}})
        assert shared.json["shares"] == {"1": 0.75, "2": 0.25}
        seen = Counter(answer(web) for _ in range(200))
        assert seen.keys() == {1, 2}
        assert seen[1] > seen[2]
        for key in ("ada", "bob", "eve", "joe", "kim"):
            header = {"headers": {"Inferno-Sticky-Key": key}}
            assert len({answer(client, **header) for client in (web, other_web) * 2}) == 1

        # Out of service means that nobody gets it, not even by its number.
        gone = web.post("/v1/models:unload", json={"name": "m", "version": 2})
        assert gone.json["unloaded"] is True
        assert loaded(web) == [1, 3]
        refused = other_web.post(
            "/v1/models/m:predict", json={"inputs": {"text": "x"}, "version": 2}
        )
        assert refused.status_code == 404
        assert "version 2 of m was unloaded" in refused.json["detail"]
        assert {answer(web) for _ in range(20)} == {1}

        assert web.post("/v1/models:unload", json={"name": "m"}).status_code == 200
        assert loaded(web) == []
        response = other_web.post("/v1/models/m:predict", json={"inputs": {"text": "x"}})
        assert response.status_code == 404
        assert web.get("/models/m").json["ready"] is False

        assert web.post("/v1/models/m/active", json={"version": "latest"}).status_code == 200
        assert answer(other_web) == 3
        assert web.get("/models/m/active").json["follows_latest"] is True


def test_what_cannot_be_loaded_is_refused_and_the_old_version_goes_on(
    repository, web, start_worker, celery
):
    with start_worker("m"):
        assert answer(web) == 1
        add(repository, 2, "corrupt")
        refused = load(web, 2)
        assert refused.status_code == 409
        assert refused.json["code"] == "load_failed"
        assert " cannot load m version 2" in refused.json["detail"]
        assert "this artifact is corrupt" in refused.json["detail"]
        assert answer(web) == 1
        # The newest that all workers have is the latest, and what is wrong can be seen.
        (failed,) = (w for w in web.get("/models/m").json["workers"] if w["version"] == 2)
        assert failed["state"] == "failed"
        assert "this artifact is corrupt" in failed["error"]

        # Files that were changed in place are looked at when they are asked for.
        (repository.root / "m" / "2" / "artifact.txt").write_text("2")
        assert load(web, 2).status_code == 200
        assert answer(web) == 2
        (repository.root / "m" / "2" / "artifact.txt").write_text("corrupt")
        assert load(web, 2).status_code == 409
        assert answer(web) == 2, "what was loaded is still there"

        assert load(web, 7).status_code == 404
        assert web.post("/v1/models:load", json={"name": "m", "versoin": 1}).status_code == 422
        # Another client's task may name any version, and none.
        assert send(celery, "m", "x").get(timeout=10)["version"] == 2

        # A task that got to a worker which cannot load its version is tried again, and then kept.
        wait_until(lambda: loaded(web) == [2])
        (repository.root / "m" / "1" / "artifact.txt").write_text("corrupt")
        body = {"inputs": {"text": "x"}, "version": 1}
        failed = web.post("/v1/models/m:predict", json=body)
        assert (failed.status_code, failed.json["code"]) == (503, "not_loaded")
        (repository.root / "m" / "1" / "artifact.txt").write_text("1")
        again = web.post(f"/dead/{failed.json['task_id']}/replay").json["task_id"]
        replayed = web.get(f"/tasks/{again}?wait=10").json
        assert (replayed["status"], replayed["version"]) == ("succeeded", 1)
    nobody = load(web, 1)
    assert nobody.status_code == 503
    assert "no live worker serves m" in nobody.json["detail"]


def test_swaps_under_load_fail_nobody_and_answer_nobody_with_the_old_version(
    repository, web, other_web, start_worker
):
    add(repository, 2)
    #: The version of each load, when that returned, and when the next one began.
    times: list[tuple[int, float, float]] = []
    #: When each request was sent and answered, and by which version.
    answers: list[tuple[float, float, int]] = []
    errors: list[BaseException] = []
    over = threading.Event()

    def answered_since(time_s: float) -> bool:
        return bool(errors) or answers[-1][0] > time_s

    def call(client: FlaskClient) -> None:
        try:
            while not over.is_set():
                sent = time.monotonic()
                version = answer(client)
                answers.append((sent, time.monotonic(), version))
        except BaseException as exc:
            errors.append(exc)

    with start_worker("m"):
        assert load(web, 1).status_code == 200
        callers = [
            threading.Thread(target=call, args=(client.application.test_client(),))
            for client in (web, other_web) * 4
        ]
        for caller in callers:
            caller.start()
        try:
            for version in (2, 1) * 6:
                assert load(web, version).status_code == 200
                returned = time.monotonic()
                # The next one begins when this one has answered somebody.
                wait_until(partial(answered_since, returned))
                times.append((version, returned, time.monotonic()))
        finally:
            over.set()
            for caller in callers:
                caller.join()
    assert errors == []
    for version, since, until in times:
        # Whoever still waits when the next load begins may be answered by what that one brings.
        between = {by for sent, answered, by in answers if since < sent and answered < until}
        assert between == {version}


@pytest.mark.parametrize("activate", [True, False])
def test_a_version_that_came_a_moment_ago_answers_through_every_front_end(
    repository, web, other_web, start_worker, monkeypatch, activate
):
    with start_worker("m"):
        assert answer(other_web) == 1
        # The folder is looked at no more for what is missing, as if that had just been done.
        monkeypatch.setattr("tasks.intake.catalog.MISSING_S", math.inf)
        add(repository, 2)
        assert load(web, 2, activate=activate).status_code == 200
        response = other_web.post(
            "/v1/models/m:predict",
            json={"inputs": {"text": "x"}},
            headers={} if activate else {"Inferno-Version": "2"},
        )
        assert response.status_code == 200, response.json
        assert response.json["version"] == 2


def test_each_worker_says_what_it_holds_and_comes_back_to_what_is_wanted(
    repository, web, start_worker, settings, tmp_path
):
    add(repository, 2)
    other_disk = tmp_path / "other"
    shutil.copytree(repository.root, other_disk)
    (other_disk / "m" / "2" / "artifact.txt").write_text("corrupt")

    def states() -> Counter[tuple[int, str]]:
        workers = web.get("/models/m").json["workers"]
        return Counter((worker["version"], worker["state"]) for worker in workers)

    with ExitStack() as fleet:
        first = fleet.enter_context(start_worker("m"))
        fleet.enter_context(start_worker("m"))
        wait_until(lambda: states() == {(2, "ready"): 2})
        assert load(web, 2).status_code == 200

        # One whose disk is broken takes no tasks, and says why.
        fleet.enter_context(start_worker("m", INFERNO_REPOSITORY__ROOT=str(other_disk)))
        wait_until(lambda: states() == {(2, "ready"): 2, (2, "failed"): 1})
        assert {answer(web) for _ in range(50)} == {2}
        refused = load(web, 2)
        assert refused.status_code == 409
        assert refused.json["detail"].count("cannot load m version 2") == 1

        # A worker that comes new has what is wanted before it takes tasks.
        assert load(web, 1).status_code == 200
        first.terminate()
        first.wait(timeout=20)
        fleet.enter_context(start_worker("m"))
        assert {answer(web) for _ in range(50)} == {1}
        wait_until(lambda: states()[1, "ready"] == 3)

        # Mended, it has its part of the work.
        (other_disk / "m" / "2" / "artifact.txt").write_text("2")
        assert load(web, 2).status_code == 200
        assert states()[2, "ready"] == 3


def test_what_nobody_uses_is_unloaded_and_comes_back_when_asked_for(repository, web, start_worker):
    for version in (2, 3):
        add(repository, version)
    with start_worker(
        "m",
        INFERNO_REPOSITORY__PRELOAD="all",
        INFERNO_REPOSITORY__IDLE_UNLOAD_S="0.3",
        INFERNO_REPOSITORY__PINNED='["m/2"]',
    ):
        wait_until(lambda: loaded(web) == [2, 3])
        assert answer(web, headers={"Inferno-Version": "1"}) == 1
        wait_until(lambda: loaded(web) == [2, 3])
