"""A web process as it is deployed, with small limits for its sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Event, Thread
from time import monotonic

import psutil
import pytest

from inferno.testing.processes import web

#: Seconds and numbers that a test can wait for.
LIMITS = {
    "PING_INTERVAL_S": "1",
    "MESSAGE_TIMEOUT_S": "1",
    "SEND_TIMEOUT_S": "2",
    "MESSAGES_PER_S": "2000",
    "MAX_PER_ADDRESS": "8",
    "MAX_HELD_BYTES": "16000000",
    "MAX_SUBSCRIPTIONS": "1000",
}


class Server:
    """One web process of gunicorn."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._port = int(address.rpartition(":")[2])
        (master,) = (
            process
            for process in psutil.Process().children(recursive=True)
            if any(one.laddr.port == self._port for one in process.net_connections("tcp"))
            and process.children()
        )
        (self.process,) = master.children()

    def megabytes(self) -> float:
        """Return the memory of the process."""
        return float(self.process.memory_info().rss) / 1e6

    def descriptors(self) -> int:
        """Return the number of open files and sockets of the process."""
        return int(self.process.num_fds())

    def connections(self) -> int:
        """Return the number of clients that are connected to the process."""
        connections = self.process.net_connections("tcp")
        return sum(one.laddr.port == self._port and bool(one.raddr) for one in connections)

    def get(self, path: str) -> int:
        """Return the status of a call."""
        connection = HTTPConnection(self.address, timeout=20)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()


class Bystander(Thread):
    """A normal client, which calls ten times a second until the end of the block."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._over = Event()
        self.waits_s: list[float] = []

    def __enter__(self) -> Bystander:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(30)

    def run(self) -> None:
        connection = HTTPConnection(self._address, timeout=20)
        while not self._over.wait(0.1):
            begun = monotonic()
            connection.request("GET", "/health/live")
            answer = connection.getresponse()
            answer.read()
            self.waits_s.append(monotonic() - begun if answer.status == 200 else 99.0)
        connection.close()


@pytest.fixture(scope="package")
def server(
    redis_url: str, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    env = {
        "INFERNO_REDIS__URL": redis_url,
        "INFERNO_SERVER__HOSTS": "here",
        "INFERNO_REPOSITORY__ROOT": str(repository),
        **{f"INFERNO_WEBSOCKET__{name}": value for name, value in LIMITS.items()},
    }
    with web(env, tmp_path_factory.mktemp("web") / "web.log") as address:
        yield Server(address)


def problem(text: bytes) -> dict[str, object]:
    """Return the problem in the body of an answer."""
    head, _, body = text.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head, head
    document: dict[str, object] = json.loads(body)
    return document
