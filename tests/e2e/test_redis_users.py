"""The platform on a Redis with TLS, where each process has a user of its own with few rights."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis
import websocket

from inferno.client import Client
from inferno.errors import ServingError
from inferno.operate.ports import free_port
from inferno.operate.redis_program import find_program
from inferno.testing.processes import ROOT, command_path, process, wait_until, web, worker
from tests.integration.conftest import Repository
from tests.receiver import Receiver, receiver

USERS = ROOT / "deploy" / "redis-users.acl"
MODEL = "swapped"


@dataclass(frozen=True)
class Deployment:
    """The running processes."""

    client: Client
    flower_url: str
    repository: Repository
    here: Receiver
    #: Sees everything, as an operator of Redis does.
    operator: redis.Redis
    port: int
    certificate: Path
    #: Starts one more worker.
    start_worker: Callable[[], AbstractContextManager[subprocess.Popen[bytes]]]

    def connect(self, user: str) -> redis.Redis:
        """Return a client of Redis with the rights of a process."""
        return redis.Redis.from_url(url(user, self.port, self.certificate))


def url(user: str, port: int, certificate: Path) -> str:
    return f"rediss://{user}:secret-of-{user}@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1; its key is beside it."""
    file = tmp_path_factory.mktemp("tls") / "redis.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(file.with_suffix(".key")), "-out", str(file)]
    command += ["-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return file


@contextmanager
def redis_with_users(folder: Path, certificate: Path) -> Iterator[int]:
    """Run a server that speaks TLS only, with the documented users; yields its port."""
    users = folder / "users.acl"
    # A worker of one model gets along with fewer lanes than the file grants.
    few = f"~stream:{MODEL}:* ~stream:webhooks:*"
    text = USERS.read_text().replace(">CHANGE-", ">secret-of-")
    text = re.sub(r"(user worker .*)~stream:\*", rf"\1{few}", text)
    assert few in text
    users.write_text(f"{text}user operator on >secret-of-operator ~* &* +@all\n")
    port, log = free_port(), folder / "redis.log"
    command = [str(find_program().path), "--port", "0", "--tls-port", str(port)]
    command += ["--bind", "127.0.0.1", "--dir", str(folder), "--aclfile", str(users)]
    command += ["--tls-cert-file", str(certificate), "--tls-ca-cert-file", str(certificate)]
    command += ["--tls-key-file", str(certificate.with_suffix(".key")), "--tls-auth-clients", "no"]
    with process(command, {}, log) as popen:
        wait_until(lambda: b"Ready to accept" in log.read_bytes() or popen.poll() is not None)
        assert popen.poll() is None, log.read_text()
        yield port


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, certificate: Path) -> Iterator[Deployment]:
    """Every process of the Procfile, each as its own user."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "models").mkdir()
    repository = Repository(folder / "models")
    repository.add(MODEL, cache={"results": True, "coalesce": False, "deduplicate": False})
    with ExitStack() as stack:
        port = stack.enter_context(redis_with_users(folder, certificate))
        here = stack.enter_context(receiver())
        flower_port = free_port()

        def env(user: str) -> dict[str, str]:
            return {
                "INFERNO_REDIS__URL": url(user, port, certificate),
                "INFERNO_REPOSITORY__ROOT": str(repository.root),
                "INFERNO_REPOSITORY__RECONCILE_INTERVAL_S": "0.2",
                "INFERNO_WEBHOOKS__ALLOW_PRIVATE": "true",
                "INFERNO_FLOWER__PORT": str(flower_port),
                "FLOWER_UNAUTHENTICATED_API": "true",
            }

        log = folder / "processes.log"
        flower = [command_path("celery"), "-A", "tasks", "flower"]
        stack.enter_context(
            process([*flower, "--conf=monitoring/flower_conf.py"], env("flower"), log)
        )
        stack.enter_context(worker("webhooks", env("webhooks"), log))
        stack.enter_context(worker(MODEL, env("worker"), log))
        address = stack.enter_context(web(env("web"), log))
        client = stack.enter_context(Client(f"http://{address}"))
        operator = stack.enter_context(
            redis.Redis.from_url(url("operator", port, certificate), decode_responses=True)
        )
        flower_url = f"http://127.0.0.1:{flower_port}"
        wait_until(lambda: b"Visit me at" in log.read_bytes())
        wait_until(lambda: all(model["ready"] for model in client.models()))
        yield Deployment(
            client,
            flower_url,
            repository,
            here,
            operator,
            port,
            certificate,
            lambda: worker(MODEL, env("worker"), folder / "second.log"),
        )


def test_every_way_to_use_the_platform_works(deployment: Deployment) -> None:
    client, repository = deployment.client, deployment.repository
    assert client.predict(MODEL, "at once").outputs["text"].tolist() == ["at once"]
    assert client.predict(MODEL, "at once").outputs["text"].tolist() == ["at once"]
    assert client.submit(MODEL, "later").result().outputs["text"].tolist() == ["later"]
    assert client.submit(MODEL, "once:again").result().outputs["text"].tolist() == ["once:again"]

    with closing(websocket.create_connection(f"{client.url.replace('http', 'ws')}/ws")) as socket:
        socket.send(json.dumps({"type": "submit", "id": "a", "model": MODEL, "inputs": "socket"}))
        assert json.loads(socket.recv())["type"] == "accepted"
        assert json.loads(socket.recv())["data"]["outputs"]["text"]["data"] == ["socket"]

    task = client.submit(MODEL, "called back", webhook=deployment.here.url("/hook"))
    wait_until(lambda: deployment.here.at("/hook"))
    assert task.id in deployment.here.at("/hook")[0].body.decode()

    client.pause(MODEL)
    cancelled = client.submit(MODEL, "cancelled")
    purged = client.submit(MODEL, "purged")
    cancelled.cancel()
    assert client.lane(MODEL)["waiting"] == 1
    assert client.purge(MODEL, 1) == 1
    client.resume(MODEL)
    assert {client.task(t.id)["status"] for t in (cancelled, purged)} == {"cancelled"}

    doomed = client.submit(MODEL, f"until:{repository.mended}")
    with pytest.raises(ServingError):
        doomed.result()
    assert [letter["task_id"] for letter in client.dead_letters()] == [doomed.id]
    repository.mended.touch()
    client.replay(doomed.id).result()
    assert client.cache()
    assert client.clear_cache() >= 1
    assert len(list(client.tasks())) >= 6
    assert client.health()["redis"] == "ok"
    assert denied(deployment) == []


def test_versions_are_swapped_and_a_killed_worker_is_replaced(deployment: Deployment) -> None:
    client, repository = deployment.client, deployment.repository
    repository.add(MODEL, version=2)
    wait_until(lambda: client.predict(MODEL, "which").version == 2)
    client.activate(MODEL, 1)
    assert client.predict(MODEL, "which").version == 1

    with deployment.start_worker() as second:
        gate = repository.root.parent / "gate"
        held = [client.submit(MODEL, f"hold:{gate}") for _ in range(40)]
        wait_until(lambda: repository.ran().count(f"hold:{gate}") > 1)
        second.send_signal(signal.SIGKILL)
        gate.touch()
        assert [task.result(timeout_s=60) for task in held]
    assert denied(deployment) == []


def test_flower_shows_workers_tasks_and_lanes(deployment: Deployment) -> None:
    with httpx.Client(base_url=deployment.flower_url, timeout=10) as flower:
        workers = flower.get("/api/workers", params={"refresh": "true"}).json()
        assert {name.split("-")[0] for name in workers} >= {MODEL, "webhooks"}
        task = deployment.client.submit(MODEL, "seen")
        task.result()
        wait_until(lambda: task.id in flower.get("/api/tasks").json())
        queues = flower.get("/api/queues/length").json()["active_queues"]
        assert {queue["name"] for queue in queues} >= {MODEL, "webhooks"}
    assert denied(deployment) == []


@pytest.mark.parametrize("user", ["web", "worker", "webhooks", "flower"])
def test_no_process_can_do_what_it_need_not(deployment: Deployment, user: str) -> None:
    deployment.operator.set("another-program", "secret")
    foreign = ["GET another-program", "SET another-program x", "DEL another-program"]
    server = [
        "CONFIG GET *",
        "FLUSHALL",
        "KEYS *",
        "SCAN 0",
        "ACL LIST",
        "SHUTDOWN",
        "MONITOR",
    ]
    allowed = []

    with deployment.connect(user) as client:
        for command in [*foreign, *server, "REPLICAOF no one"]:
            try:
                client.execute_command(*command.split())
            except redis.exceptions.NoPermissionError:
                continue
            allowed.append(command)

    deployment.operator.execute_command("ACL LOG RESET")
    assert allowed == []
    assert deployment.operator.get("another-program") == "secret"


def denied(deployment: Deployment) -> list[str]:
    """Return what Redis has denied to the processes."""
    return [
        f"{entry['username']}: {entry['reason']} {entry['object']}"
        for entry in deployment.operator.acl_log()
    ]
