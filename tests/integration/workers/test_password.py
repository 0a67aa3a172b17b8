"""A worker whose Redis wants another password says so at its start, and ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from inferno.testing.processes import command_path, process, redis_server, wait_until


@pytest.mark.parametrize("user", ["", ":wrong@"])
def test_a_worker_without_the_password_says_where_to_set_it(tmp_path: Path, user: str) -> None:
    log = tmp_path / "worker.log"
    with redis_server(tmp_path) as url:
        with redis.Redis.from_url(url) as client:
            client.config_set("requirepass", "secret")
        env = {"INFERNO_REDIS__URL": url.replace("://", f"://{user}")}
        command = [command_path("celery"), "-A", "tasks", "worker", "-Q", "webhooks"]
        with process(command, env, log) as popen:
            wait_until(lambda: popen.poll() is not None)
            assert popen.returncode != 0
    assert "Error: Redis refuses this worker: " in log.read_text()
    assert "; set the password in INFERNO_REDIS__URL" in log.read_text()
    assert "wrong@" not in log.read_text()
