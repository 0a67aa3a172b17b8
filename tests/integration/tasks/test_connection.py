"""Whether a command may have reached Redis."""

from __future__ import annotations

import socket
from pathlib import Path
from threading import Thread

import pytest
import redis

from inferno.settings import Settings
from tasks.broker.connection import connect, never_sent


def failure(url: str) -> Exception:
    """Return the error of a command."""
    with connect(Settings(redis={"url": url})) as client, pytest.raises(redis.RedisError) as raised:
        client.get("key")
    return raised.value


def test_nothing_is_sent_to_a_server_that_is_not_there(tmp_path: Path) -> None:
    abandoned = tmp_path / "abandoned.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(abandoned))

    assert never_sent(failure(f"unix://{tmp_path}/missing.sock"))
    assert never_sent(failure(f"unix://{abandoned}"))
    assert never_sent(failure("redis://127.0.0.1:1/0"))


def test_a_command_may_have_been_done_when_its_connection_ends(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def hang_up() -> None:
            connection, _ = server.accept()
            # First the connection is given its name.
            connection.recv(1000)
            connection.close()

        thread = Thread(target=hang_up)
        thread.start()
        error = failure(f"unix://{path}")
        thread.join()

    assert not never_sent(error)
