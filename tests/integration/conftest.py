"""A model repository made for the test, a worker that serves it, and a plain Celery client."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import kombu.pools
import pytest
import redis
import yaml
from celery import Celery
from celery.result import AsyncResult
from flask.testing import FlaskClient

from inferno.protocol.limits import UNLIMITED, Limits
from inferno.protocol.requests import MAX_PRIORITY, parse_submit
from inferno.repository.repository import Repository as Packages
from inferno.settings import Settings
from inferno.testing.processes import wait_until, worker
from tasks.broker.connection import connect
from tasks.control.replay import Replay
from tasks.control.tasks import Control
from tasks.intake.submit import Submitter
from tasks.state.dead import DeadLetters
from tasks.state.records import Record, Records
from tasks.state.statistics import Statistics
from tasks.state.transitions import Arrival, Transitions
from tasks.transport import register
from web.app import create_app

#: What lanes are on: Redis Streams, Celery's own lists in Redis, RabbitMQ.
BROKERS = ("streams", "redis", "amqp")

#: A model whose behaviour each text asks for; it notes every row that it runs in a ledger.
CODE = """
import ctypes, os, pathlib, signal, time

class Transient(RuntimeError):
    transient = True

class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")

def build(context):
    ledger = pathlib.Path(context.parameters["ledger"])
    def model(inputs):
        texts = inputs["text"].tolist()
        with ledger.open("a") as file:
            file.write("".join(f"{text}\\n" for text in texts))
        for text in texts:
            if text.startswith("poison"):
                raise RuntimeError("poisonous")
            if text == "exit":
                raise SystemExit(3)
            if text == "unwritable":
                raise RuntimeError("half of a pair: \\ud800")
            if text == "mute":
                raise Mute
            if text.startswith("sleep:"):
                time.sleep(float(text.split(":")[1]))
            if text.startswith("kill"):
                if not pathlib.Path(context.parameters["mended"]).exists():
                    os.kill(os.getpid(), signal.SIGKILL)
            if text.startswith("lock:"):
                # Without giving Python's lock away.
                ctypes.PyDLL(None).usleep(int(float(text.split(":")[1]) * 1e6))
            if text.startswith("hold:"):
                while not pathlib.Path(text[5:]).exists():
                    time.sleep(0.01)
            if text.startswith("once:") and ledger.read_text().split("\\n").count(text) == 1:
                raise Transient("not yet")
            if text.startswith("never"):
                raise Transient("never")
            if text.startswith("until:") and not pathlib.Path(text[6:]).exists():
                raise Transient("not yet")
        if texts[0] != "warm" and len(texts) > context.parameters.get("memory", 10**9):
            raise MemoryError
        return {"text": inputs["text"]}
    return model
"""

SIGNATURE = {
    "inputs": [{"name": "text", "dtype": "string", "shape": ["batch"]}],
    "outputs": [{"name": "text", "dtype": "string", "shape": ["batch"]}],
}


def app_client(settings: Settings) -> Iterator[FlaskClient]:
    """Yield a client of the web tier, in this process."""
    app = create_app(settings)
    yield app.test_client()
    app.extensions["inferno"].close()


class Repository:
    """Packages below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ledger = root.parent / "ledger.txt"
        self.ledger.touch()
        #: Once it exists, texts that kill the worker do so no longer.
        self.mended = root.parent / "mended"

    def add(self, name: str, version: int = 1, code: str = CODE, **fields: Any) -> None:
        """Write a package of format python."""
        folder = self.root / name / str(version)
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(code)
        manifest = {
            "name": name,
            "version": version,
            "format": "python",
            "entrypoint": "model:build",
            "signature": SIGNATURE,
            "retries": {"max_retries": 2, "backoff_s": 0.2, "max_backoff_s": 0.3},
            "warm_up": {"inputs": {"text": "warm"}},
            "parameters": {"ledger": str(self.ledger), "mended": str(self.mended)},
            **fields,
        }
        given = {key: value for key, value in manifest.items() if value is not None}
        (folder / "model.yaml").write_text(yaml.safe_dump(given))

    def ran(self) -> list[str]:
        """Return the texts that were run, without those of the warm-up."""
        return [text for text in self.ledger.read_text().splitlines() if text != "warm"]


def send(celery: Celery, model: str, text: str | list[str], **options: Any) -> AsyncResult:
    """Send a text to a model as any Celery client would."""
    kwargs = {"inputs": {"text": text}}
    return celery.send_task(f"infer.{model}", kwargs=kwargs, queue=model, **options)


def accept(
    transitions: Transitions, record: Record, lane: str, payload: str, **options: Any
) -> str:
    """Accept one task; returns its id, or raises why it is refused."""
    (answer,) = transitions.accept([Arrival(record, lane, payload.encode(), **options)])
    if isinstance(answer, Exception):
        raise answer
    return answer.task_id


@contextmanager
def occupied(celery: Celery, model: str, repository: Repository) -> Iterator[Callable[[int], None]]:
    """Keep a worker's only executor busy; yields a function that waits until so many tasks wait."""
    gate = repository.root.parent / f"gate-{model}"
    busy = send(celery, model, f"hold:{gate}")
    wait_until(lambda: f"hold:{gate}" in repository.ran())

    def wait_for(count: int) -> None:
        wait_until(lambda: count == sum(map(len, reserved(celery).values())))

    try:
        yield wait_for
    finally:
        gate.touch()
    busy.get(timeout=10)


def reserved(celery: Celery) -> dict[str, list[Any]]:
    """Return what waits in each worker's hands."""
    return celery.control.inspect(timeout=1).reserved() or {}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty model repository."""
    root = tmp_path / "models"
    root.mkdir()
    return Repository(root)


@pytest.fixture
def broker() -> str:
    """The kind of broker, of `BROKERS`; modules whose tests should pass on all override this."""
    return "streams"


@pytest.fixture
def broker_url(broker: str, redis_url: str, request: pytest.FixtureRequest) -> str | None:
    """What `INFERNO_BROKER__URL` is set to, if anything."""
    if broker == "amqp":
        return str(request.getfixturevalue("amqp_url"))
    return redis_url if broker == "redis" else None


@pytest.fixture
def env(repository: Repository, redis_url: str, broker_url: str | None) -> dict[str, str]:
    """The environment of the platform's processes."""
    named = {"INFERNO_BROKER__URL": broker_url} if broker_url else {}
    return named | {
        "INFERNO_REDIS__URL": redis_url,
        "INFERNO_REPOSITORY__ROOT": str(repository.root),
        "INFERNO_WORKER__HEARTBEAT_INTERVAL_S": "0.2",
        "INFERNO_WORKER__HEARTBEAT_TTL_S": "2",
        "INFERNO_WORKER__LEASE_S": "10",
    }


@pytest.fixture
def start_worker(
    env: dict[str, str], log: Path
) -> Callable[..., AbstractContextManager[Popen[bytes]]]:
    """Start a worker of a model, with further settings; to be used in a `with` statement."""
    return lambda model, **more: worker(model, env | more, log)


@pytest.fixture
def settings(redis_url: str, repository: Repository, broker_url: str | None) -> Settings:
    """The settings that the worker has."""
    return Settings(
        redis={"url": redis_url},
        repository={"root": repository.root},
        broker={"url": broker_url},
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    """A connection to the private Redis."""
    with connect(settings) as connection:
        yield connection


@pytest.fixture
def records(client: redis.Redis, settings: Settings) -> Records:
    """The records of the private Redis."""
    return Records(client, settings)


@pytest.fixture
def statistics(client: redis.Redis, settings: Settings) -> Statistics:
    """What the versions in the private Redis have come to."""
    return Statistics(client, settings)


@pytest.fixture
def transitions(client: redis.Redis, settings: Settings) -> Transitions:
    """The changes of tasks in the private Redis."""
    return Transitions(client, settings)


@pytest.fixture
def celery(settings: Settings) -> Iterator[Celery]:
    """A Celery client that knows nothing of Inferno but its transport, task and queue names."""
    register()
    app = Celery("anyone", broker=settings.broker_url, backend=settings.redis_url)
    # RabbitMQ has queues with and without priorities, and refuses to declare one as the other.
    app.conf.task_queue_max_priority = MAX_PRIORITY
    yield app
    # An AsyncResult unsubscribes when it is deleted, which needs the connection.
    gc.collect()
    app.backend.result_consumer.stop()
    app.backend.client.close()
    app.close()
    kombu.pools.reset()


@pytest.fixture
def submitter(celery: Celery, client: redis.Redis, settings: Settings) -> Submitter:
    """Publishes tasks as the web tier does."""
    return Submitter(celery, client, settings)


@pytest.fixture
def submit(submitter: Submitter, settings: Settings) -> Callable[[str, str], str]:
    """Submit a text to a model as the web tier does; returns the task's id."""

    def submit(model: str, text: str) -> str:
        package = Packages.read(settings.repository).model(model).package()
        request = parse_submit(
            json.dumps({"model": model, "inputs": {"text": text}}).encode(), UNLIMITED
        )
        inputs = request.arrays(package.signature, Limits(1000, 1000, 1000))
        return submitter.submit(request, package, inputs).task_id

    return submit


@pytest.fixture
def control(celery: Celery, client: redis.Redis, settings: Settings) -> Control:
    """What ends and purges tasks."""
    return Control(celery, client, settings)


@pytest.fixture
def dead(client: redis.Redis, settings: Settings) -> DeadLetters:
    """The dead letters of the private Redis."""
    return DeadLetters(client, settings)


@pytest.fixture
def replay(celery: Celery, client: redis.Redis, settings: Settings) -> Replay:
    """What runs finished tasks again."""
    return Replay(Submitter(celery, client, settings), client, settings)
