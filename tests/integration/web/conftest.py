"""The web tier on a Redis of its own. A fake worker settles tasks; everything else is real."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kombu.pools
import msgspec
import pytest
import redis
import yaml
from celery import Celery
from flask import Flask
from flask.testing import FlaskClient

from inferno.errors import InfernoError
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from inferno.testing.processes import redis_server, wait_until
from tasks.broker.lanes import Held, Lanes
from tasks.celery import app as celery_app
from tasks.intake.submit import Accepted, Submitter
from tasks.state.cluster import Cluster, WorkerReport
from tasks.state.outcomes import encode_outcome
from tasks.state.records import Records
from tasks.state.transitions import Step, Transitions
from tests.integration.web.conformance import CheckedClient, Conformance
from web.app import create_app

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)

TEXT = {"name": "text", "dtype": "string", "shape": ["batch"]}
SCORES = {"name": "scores", "dtype": "float32", "shape": ["batch", 2]}
MANIFESTS: list[dict[str, Any]] = [
    {
        "name": "sentiment",
        "version": version,
        "format": "onnx",
        "task": "classification",
        "description": "Says whether a text is kind.",
        "labels": ["unkind", "kind"],
        "signature": {"inputs": [TEXT], "outputs": [SCORES]},
        "warm_up": {"inputs": {"text": "A sample sentence."}},
    }
    for version in (1, 2)
] + [
    {
        "name": "digits",
        "version": 1,
        "format": "torchscript",
        "task": "classification",
        "labels": [str(digit) for digit in range(10)],
        "signature": {
            "inputs": [
                {"name": "image", "dtype": "bytes", "shape": ["batch"], "content": "image"},
            ],
            "outputs": [{"name": "scores", "dtype": "float32", "shape": ["batch", 10]}],
        },
    },
    {
        "name": "tokens",
        "version": 1,
        "format": "python",
        "batching": {"max_batch_size": 4, "oversized": "refuse"},
        "signature": {
            "inputs": [
                {"name": "tokens", "dtype": "int64", "shape": ["batch", "n"]},
                {"name": "mask", "dtype": "float32", "shape": ["batch", "n"]},
            ],
            "outputs": [SCORES],
        },
    },
]


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of these tests' own, because they empty it."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the tests' own Redis, which is empty."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for manifest in MANIFESTS:
        folder = root / manifest["name"] / str(manifest["version"])
        folder.mkdir(parents=True)
        (folder / "model.yaml").write_text(yaml.safe_dump(manifest))
    broken = root / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "model.yaml").write_text("name: broken\nversion: one\n")
    return root


@pytest.fixture(scope="module")
def settings(redis_url: str, repository: Path) -> Settings:
    return Settings.model_validate(
        {
            "redis": {"url": redis_url},
            "repository": {"root": repository},
            "server": {"sync_wait_ms": 20_000},
        }
    )


@pytest.fixture(scope="session")
def broker(redis_url: str) -> Iterator[Celery]:
    """The project's Celery app, on the tests' own Redis."""
    celery_app.conf.broker_url = celery_app.conf.result_backend = redis_url
    celery_app.close()
    yield celery_app
    celery_app.close()
    kombu.pools.reset()


class AnnouncingSubmitter(Submitter):
    """Publishes as ever, and tells the fake worker what it has published."""

    published: queue.SimpleQueue[Accepted | None]

    def submit(self, *args: Any, **kwargs: Any) -> Accepted:
        accepted = super().submit(*args, **kwargs)
        self.published.put(accepted)
        return accepted


def texts(*values: str) -> dict[str, Any]:
    """A tensor of the wire that holds texts."""
    return {"dtype": "string", "shape": [len(values)], "data": list(values)}


class FakeWorker:
    """Settles tasks as a worker does: in Celery's format, stored and announced."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self.records = Records(client, settings)
        self.transitions = Transitions(client, settings)
        self.cluster = Cluster(client, settings)
        self.client = client
        self.published: queue.SimpleQueue[Accepted | None] = queue.SimpleQueue()
        #: How published tasks are answered once `answer_all` was called.
        self.outcome: Callable[[Accepted], Any] = lambda task: {"text": texts(task.task_id)}

    def serve(self, **models: list[int]) -> None:
        now = time.time()
        self.cluster.report(WorkerReport("fake@host", models, "ready", "cpu", 1, now))

    def succeed(self, task_id: str, outputs: Any = None, model: str = "sentiment") -> None:
        result = {
            "model": model,
            "version": 2,
            "outputs": outputs
            or {"scores": {"dtype": "float32", "shape": [1, 2], "data": [[0, 1]]}},
            "timings": {"queue_ms": 1, "batch_wait_ms": 2, "inference_ms": 3, "total_ms": 6},
            "batch": {
                "id": "b",
                "size": 1,
                "rows": 1,
                "flush_reason": "idle",
                "predicted_ms": 2.5,
                "run_ms": 3.0,
            },
            "worker": "fake@host",
        }
        payload = encode_outcome(task_id, msgspec.json.encode(result))
        self.end(task_id, TaskState.SUCCEEDED, payload, model)

    def fail(
        self,
        task_id: str,
        error: InfernoError,
        state: TaskState = TaskState.FAILED,
        model: str = "sentiment",
    ) -> None:
        self.end(task_id, state, encode_outcome(task_id, error), model)

    def end(self, task_id: str, state: TaskState, payload: bytes, model: str) -> None:
        commands = self.transitions.commands.ended({"model": model}, task_id, state, payload)
        self.transitions.finish([Step(task_id, Held(), commands)])

    def settle(self, task: Accepted) -> None:
        outcome = self.outcome(task)
        if isinstance(outcome, InfernoError):
            self.fail(task.task_id, outcome)
        else:
            self.succeed(task.task_id, outcome, task.model)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Settle whatever is published, until the end of the block."""
        thread = threading.Thread(target=self.run)
        thread.start()
        yield
        self.published.put(None)
        thread.join()

    def run(self) -> None:
        while (task := self.published.get()) is not None:
            self.settle(task)


def with_gateway(app: Flask, **parts: Any) -> None:
    """Replace parts of an app's gateway."""
    services = app.extensions["inferno"]
    gateway = dataclasses.replace(services.gateway, **parts)
    app.extensions["inferno"] = dataclasses.replace(services, gateway=gateway)


@contextmanager
def announcing_app(
    settings: Settings, store: redis.Redis, worker: FakeWorker, broker: Celery
) -> Iterator[Flask]:
    """The app, which tells a fake worker of each task that it publishes."""
    app = create_app(settings)
    services = app.extensions["inferno"]
    submitter = AnnouncingSubmitter(broker, store, settings)
    submitter.published = worker.published
    with_gateway(app, submitter=submitter)
    yield app
    services.close()


@pytest.fixture
def app(
    settings: Settings, store: redis.Redis, worker: FakeWorker, broker: Celery
) -> Iterator[Flask]:
    with announcing_app(settings, store, worker, broker) as app:
        yield app


@pytest.fixture(scope="module")
def document(repository: Path) -> dict[str, Any]:
    """The OpenAPI document of these tests' app."""
    app = create_app(Settings.model_validate({"repository": {"root": repository}}))
    document: dict[str, Any] = msgspec.json.decode(app.test_client().get("/openapi.json").data)
    return document


@pytest.fixture
def client(app: Flask, document: dict[str, Any]) -> FlaskClient:
    """A client that fails when an answer is not as the document says."""
    client = CheckedClient(app)
    client.conformance = Conformance(app, document)
    return client


@pytest.fixture
def worker(store: redis.Redis, settings: Settings) -> FakeWorker:
    """A worker that is ready for every model; the test tells it when to settle what."""
    worker = FakeWorker(store, settings)
    worker.serve(sentiment=[1, 2], digits=[1], tokens=[1])
    return worker


@pytest.fixture
def answering(worker: FakeWorker) -> Iterator[FakeWorker]:
    """A worker that settles everything at once, by its `outcome`."""
    with worker.running():
        yield worker


@pytest.fixture
def lane(broker: Celery, store: redis.Redis, settings: Settings) -> Callable[[str], int]:
    """Counts the messages in a model's lane."""
    lanes = Lanes(broker, store, settings)
    return lambda model: lanes.backlog(model).total


@pytest.fixture
def records(store: redis.Redis, settings: Settings) -> Records:
    """The records of the tests' own Redis."""
    return Records(store, settings)


@pytest.fixture
def png() -> str:
    """A small image, as base64."""
    return PNG


@pytest.fixture(name="until", scope="session")
def until_fixture() -> Callable[..., Any]:
    return wait_until
