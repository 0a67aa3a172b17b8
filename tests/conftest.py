"""Fixtures for every tier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inferno.testing.processes import RABBITMQ, rabbitmq_server, redis_server


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private Redis, one for the whole run; tests use model names and task ids of their own."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def amqp_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private RabbitMQ, one for the whole run."""
    if not RABBITMQ.is_file():
        pytest.skip("RabbitMQ is not installed: apt-get install rabbitmq-server")
    with rabbitmq_server(tmp_path_factory.mktemp("rabbitmq")) as url:
        yield url


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A file for the output of a process."""
    path = tmp_path / "process.log"
    path.touch()
    return path
