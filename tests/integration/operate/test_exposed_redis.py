"""A Redis that everybody may use is warned of once, at the start of each process."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from inferno.testing.processes import wait_until, web, worker

WARNING = "names another machine, and neither a password nor TLS"


def test_processes_warn_of_an_exposed_redis(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    env = {
        # The same server by an address that does not tell that it is on this machine.
        "INFERNO_REDIS__URL": redis_url.replace("127.0.0.1", "0.0.0.0"),
        "INFERNO_REPOSITORY__ROOT": str(tmp_path / "models"),
    }
    logs = [tmp_path / "web.log", tmp_path / "worker.log"]

    with ExitStack() as stack:
        stack.enter_context(web(env, logs[0]))
        stack.enter_context(worker("webhooks", env, logs[1]))
        wait_until(lambda: all(WARNING in log.read_text() for log in logs))

    assert [log.read_text().count(WARNING) for log in logs] == [1, 1]


def test_processes_do_not_warn_of_a_redis_on_this_machine(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    env = {"INFERNO_REDIS__URL": redis_url, "INFERNO_REPOSITORY__ROOT": str(tmp_path / "models")}
    log = tmp_path / "web.log"

    with web(env, log):
        wait_until(lambda: "Booting worker" in log.read_text())

    assert WARNING not in log.read_text()
