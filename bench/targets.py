"""Inferno and its peers, each started and stopped as a whole."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench import environments
from bench.peers.forward import load
from bench.workloads import Numbers, Workload, texts
from inferno.operate.ports import free_port
from inferno.testing.processes import process, redis_server, wait_until

#: Limit for a target to start, in seconds; Ray and a cold disk are slow.
START_S = 120.0
#: Smallest accepted cosine to the embeddings of this machine's own forward pass.
MIN_COSINE = {"embed": 0.999, "embed-int8": 0.95}

_SIZE = re.compile(rb" *(\d+)")


class Broken(Exception):
    """A target does not start or answers wrongly, so it is not measured."""


@dataclass(frozen=True)
class Service:
    """A running target, as the load generators see it."""

    port: int
    #: Path of its synchronous call.
    path: str
    #: Returns the body of a request for texts.
    body: Callable[[list[str]], bytes]
    #: Returns the outputs of an answer, one for each text.
    outputs: Callable[[Any], list[Any]]
    #: Text in an answer before the number of requests that shared its batch.
    marker: str
    #: Whether outputs are the texts.
    echoes: bool
    #: Name of the model, if tasks can be submitted.
    model: str | None = None
    #: Further members of each submit, as JSON text that ends in a comma.
    members: bytes = b""

    def batch_size(self, answer: bytes) -> int | None:
        """Return how many requests shared the batch of an answer; None if it does not say."""
        marker = self.marker.encode()
        at = answer.find(marker)
        found = _SIZE.match(answer, at + len(marker)) if at >= 0 else None
        return int(found[1]) if found else None

    def submit(self, texts: list[str], members: bytes = b"") -> bytes:
        """Return the body that submits a task; `members` is JSON text that ends in a comma."""
        assert self.model is not None
        model = self.model.encode()
        members += self.members
        return b'{%s"model":"%s","inputs":{"text":%s}}' % (members, model, _list(texts))

    def call(
        self, method: str, path: str, body: bytes | None = None, timeout_s: float = 30
    ) -> tuple[int, Any]:
        """Call the service once; return the status and the document of the answer.

        Raises:
          OSError, http.client.HTTPException: the call failed.
          ValueError: the answer is not valid JSON.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


class Target(Protocol):
    """A server that can be measured."""

    @property
    def name(self) -> str:
        """Name in the results."""

    def install(self, say: Callable[[str], None]) -> dict[str, str]:
        """Install missing packages; return the versions of its packages.

        Raises:
          NotInstalled: a package cannot be installed.
        """

    def serve(self, workload: Workload, folder: Path) -> AbstractContextManager[Service]:
        """Run the target until the block ends, with its files in a folder.

        Raises:
          Broken: the target does not start.
        """


def _list(values: list[str]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


# -- Inferno ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inferno:
    """The platform as users run it: `inferno up`, with its own Redis and one lane."""

    name: str = "inferno"
    #: Settings that differ from the defaults.
    env: Mapping[str, str] = field(default_factory=dict)
    flower: bool = False

    def install(self, say: Callable[[str], None]) -> dict[str, str]:
        """Return the versions of its packages."""
        packages = ["celery", "Flask", "gevent", "gunicorn", "gunicorn_h1c", "kombu", "redis"]
        return environments.versions(Path(sys.executable), [*packages, "onnxruntime"])

    @contextmanager
    def serve(self, workload: Workload, folder: Path) -> Iterator[Service]:
        """Run the target until the block ends."""
        port = free_port()
        env = {
            "INFERNO_DATA__DIR": str(folder),
            "INFERNO_SERVER__PORT": str(port),
            "INFERNO_FLOWER__PORT": str(free_port()),
            "INFERNO_REPOSITORY__ACTIVE": json.dumps({workload.model: workload.version}),
            "INFERNO_REPOSITORY__PRELOAD": "active",
            **self.env,
        }
        service = Service(
            port=port,
            path=f"/v1/models/{workload.model}:predict",
            body=lambda texts: b'{"inputs":{"text":%s}}' % _list(texts),
            outputs=_inferno_outputs,
            marker='"size":',
            echoes=workload.echoes,
            model=workload.model,
        )
        flower = "--flower" if self.flower else "--no-flower"
        command = [sys.executable, "-m", "inferno", "up", "--models", workload.model, flower]
        log = folder / "inferno.log"
        with process(command, env, log) as popen:
            _wait(lambda: _serves(service, workload.model), popen.poll, log)
            yield service


def _inferno_outputs(document: Any) -> list[Any]:
    outputs = document["outputs"]
    tensor = outputs.get("text") or outputs["embedding"]
    assert "data" in tensor, "expected numbers as JSON"
    data: list[Any] = np.reshape(tensor["data"], tensor["shape"]).tolist()
    return data


def _serves(service: Service, model: str) -> bool:
    with suppress(OSError, http.client.HTTPException, ValueError):
        _, document = service.call("GET", "/health", timeout_s=5)
        return bool(document.get("models", {}).get(model))
    return False


# -- Peers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """How a peer reads requests and writes answers."""

    path: str = "/predict"
    body: Callable[[list[str]], bytes] = lambda texts: b'{"texts":%s}' % _list(texts)
    outputs: Callable[[Any], list[Any]] = lambda document: document["outputs"]
    marker: str = '"batch_size":'


def _v2_body(texts: list[str]) -> bytes:
    shape = b'"shape":[%d],"datatype":"BYTES"' % len(texts)
    return b'{"inputs":[{"name":"text",%s,"data":%s}]}' % (shape, _list(texts))


def _v2_outputs(document: Any) -> list[Any]:
    output = document["outputs"][0]
    data: list[Any] = np.reshape(output["data"], [output["shape"][0], -1]).tolist()
    return [row[0] if len(row) == 1 else row for row in data]


@dataclass(frozen=True)
class Peer:
    """Another server, started by one command."""

    name: str
    #: Arguments of the peer's Python; `{port}` and `{peer}` (its folder) are filled in.
    command: tuple[str, ...]
    packages: tuple[str, ...]
    dialect: Dialect = field(default_factory=Dialect)
    env: Mapping[str, str] = field(default_factory=dict)
    #: Worker processes, started before the server, with a Redis of their own.
    workers: tuple[tuple[str, ...], ...] = ()

    def install(self, say: Callable[[str], None]) -> dict[str, str]:
        """Install missing packages; return the versions of its packages.

        Raises:
          NotInstalled: a package cannot be installed.
        """
        python = environments.peer_python(self.name, say)
        return environments.versions(python, list(self.packages))

    @contextmanager
    def serve(self, workload: Workload, folder: Path) -> Iterator[Service]:
        """Run the target until the block ends."""
        python = environments.peer_python(self.name, lambda _: None)
        port = free_port()
        env = {
            "BENCH_WORKLOAD": workload.name,
            "BENCH_PORT": str(port),
            "BENCH_LOCK": str(folder / "executor.lock"),
            "PYTHONPATH": str(environments.ROOT),
            "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)]),
            **{name: value.format(folder=folder) for name, value in self.env.items()},
        }
        peer = environments.PEERS / self.name

        def filled(command: tuple[str, ...]) -> list[str]:
            return [str(python), *(part.format(port=port, peer=peer) for part in command)]

        dialect = self.dialect
        service = Service(
            port, dialect.path, dialect.body, dialect.outputs, dialect.marker, workload.echoes
        )
        log = folder / f"{self.name}.log"
        with ExitStack() as stack:
            if self.workers:
                env["BENCH_REDIS"] = stack.enter_context(redis_server(folder))
            for worker in self.workers:
                stack.enter_context(process(filled(worker), env, folder / "worker.log"))
            popen = stack.enter_context(process(filled(self.command), env, log))
            _wait(lambda: _answers(service), popen.poll, log)
            yield service


def _answers(service: Service) -> bool:
    with suppress(OSError, http.client.HTTPException, ValueError):
        return service.call("POST", service.path, service.body(["ready?"]), 5)[0] == 200
    return False


def _wait(ready: Callable[[], bool], ended: Callable[[], object], log: Path) -> None:
    try:
        wait_until(lambda: ended() is not None or ready(), START_S)
    except AssertionError:
        raise Broken(
            f"the server did not answer within {START_S:g} s: {_last_lines(log)}"
        ) from None
    if ended() is not None:
        raise Broken(f"the server ended while it started: {_last_lines(log)}")


def _last_lines(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").splitlines()[-5:])


_GUNICORN = ("-m", "gunicorn", "--config", "bench/peers/gunicorn_conf.py")
_CELERY = ("-m", "celery", "-A", "bench.peers.celery.worker")
_BENTOML = ("-m", "bentoml", "serve", "server:Model")

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "flask",
            (*_GUNICORN, "bench.peers.flask.server:create_app()"),
            ("Flask", "gunicorn", "gevent"),
        ),
        Peer(
            "celery",
            (*_GUNICORN, "bench.peers.celery.server:create_app()"),
            ("celery", "celery-batches", "kombu", "redis"),
            workers=((*_CELERY, "worker", "--concurrency", "1", "--loglevel", "WARNING"),),
        ),
        Peer("mosec", ("{peer}/server.py",), ("mosec",), Dialect("/inference")),
        Peer("litserve", ("{peer}/server.py",), ("litserve",)),
        Peer(
            "bentoml",
            (*_BENTOML, "--working-dir", "{peer}", "--host", "127.0.0.1", "--port", "{port}"),
            ("bentoml",),
            Dialect(outputs=lambda document: [row["output"] for row in document]),
            {"BENTOML_HOME": "{folder}", "BENTOML_DO_NOT_TRACK": "True"},
        ),
        Peer(
            "mlserver",
            ("{peer}/start.py",),
            ("mlserver", "uvloop"),
            Dialect("/v2/models/bench/infer", _v2_body, _v2_outputs, '"batch-'),
            {"MLSERVER_FOLDER": "{folder}"},
        ),
        Peer(
            "ray",
            ("{peer}/server.py",),
            ("ray",),
            env={"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "{folder}"},
        ),
    )
}


# -- Answers ---------------------------------------------------------------------------------------


@cache
def _expected(workload: str) -> Callable[[list[str]], list[Any]]:
    return load("echo" if workload == "simulated" else workload)


def verify(service: Service, workload: Workload) -> None:
    """Check the answers of a target.

    Raises:
      Broken: an answer is wrong or missing.
    """
    asked = texts(Numbers.RANGE // 2)
    for rows in (1, 3, 64):
        wanted = [next(asked) for _ in range(rows)]
        try:
            status, document = service.call("POST", service.path, service.body(wanted))
            given = service.outputs(document) if status == 200 else None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as exc:
            raise Broken(f"the server gave no answer to {rows} rows: {exc!r}") from exc
        if given is None:
            raise Broken(f"the server answered {rows} rows with {status}: {str(document)[:200]}")
        expected = _expected(workload.name)(wanted)
        if workload.echoes:
            right = given == expected
        else:
            right = np.shape(given) == np.shape(expected) and bool(
                np.min(np.sum(np.multiply(given, expected), axis=1)) >= MIN_COSINE[workload.name]
            )
        if not right:
            raise Broken(f"the server answered {rows} rows wrongly: {str(given)[:200]}")
