"""Lanes on a RabbitMQ that comes and goes."""

from __future__ import annotations

import signal
from contextlib import ExitStack

import pytest

from inferno.errors import BrokerUnavailable
from inferno.operate.ports import free_port
from inferno.testing.processes import RABBITMQ, rabbitmq_server, wait_until
from tasks.broker.lanes import Lanes, TaskMessage
from tests.integration.conftest import occupied, send

pytestmark = pytest.mark.skipif(not RABBITMQ.is_file(), reason="RabbitMQ is not installed")


class Rabbit:
    """A private RabbitMQ."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.stack = ExitStack()
        self.url = self.start()

    def start(self) -> str:
        return self.stack.enter_context(rabbitmq_server(self.folder, self.port))

    def stop(self) -> None:
        self.stack.close()


@pytest.fixture
def rabbit(tmp_path):
    folder = tmp_path / "rabbitmq"
    folder.mkdir()
    server = Rabbit(folder)
    yield server
    server.stop()


@pytest.fixture
def broker_url(rabbit):
    return rabbit.url


def test_tasks_outlive_the_broker_and_its_workers_find_it_again(
    repository, start_worker, celery, client, settings, rabbit
):
    repository.add("durable", batching={"max_batch_size": 1})
    lanes = Lanes(celery, client, settings)

    def publish(text: str) -> None:
        lanes.send(TaskMessage("durable", "infer.durable", text, {"inputs": {"text": text}}))

    with start_worker("durable"):
        with occupied(celery, "durable", repository):
            for n in range(5):
                publish(f"before {n}")
            rabbit.stop()
            for n in range(3):
                with pytest.raises(BrokerUnavailable):
                    publish(f"meanwhile {n}")
            rabbit.start()
        publish("after")
        results = [celery.AsyncResult(text).get(timeout=30) for text in ("before 4", "after")]
        assert [r["outputs"]["text"]["data"] for r in results] == [["before 4"], ["after"]]
        wait_until(lambda: len(repository.ran()) == 7)
    assert sorted(repository.ran())[:6] == ["after", *(f"before {n}" for n in range(5))]


def test_the_tasks_of_a_killed_worker_go_to_another_at_once(repository, start_worker, celery):
    repository.add("killed", batching={"max_batch_size": 4})
    gate = repository.root.parent / "gate"
    with start_worker("killed") as first:
        tasks = [send(celery, "killed", f"hold:{gate}")]
        wait_until(repository.ran)
        tasks += [send(celery, "killed", f"{n}") for n in range(20)]
        first.send_signal(signal.SIGKILL)
        first.wait()
        gate.touch()
    with start_worker("killed"):
        for task in tasks:
            task.get(timeout=20)
    assert repository.ran().count("19") == 1
