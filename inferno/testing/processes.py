"""Real processes for tests. Each one runs during a `with` block."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from inferno.operate.ports import free_port
from inferno.operate.redis_program import find_program

ROOT = Path(__file__).resolve().parents[2]


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0, what: str = "") -> object:
    """Return the first true value of a condition.

    Raises:
      AssertionError: the condition did not become true in time.
    """
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        time.sleep(0.02)


@contextmanager
def process(
    command: list[str], env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of the checkout in its own session, with its output in a file."""
    with log.open("ab") as output:
        popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield popen
    finally:
        # A process stopped by SIGSTOP takes no other signal.
        with suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGCONT)
        popen.terminate()
        try:
            popen.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()


@contextmanager
def redis_server(folder: Path, port: int = 0, program: Path | None = None) -> Iterator[str]:
    """Run a Redis server that keeps nothing on disk; yields its URL."""
    port = port or free_port()
    program = program or find_program().path
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with process([str(program), *options], {}, folder / "redis.log") as popen:
        wait_until(
            lambda: (
                b"Ready to accept" in (folder / "redis.log").read_bytes()
                or popen.poll() is not None
            )
        )
        assert popen.poll() is None, (folder / "redis.log").read_text()
        yield f"redis://127.0.0.1:{port}/0"


def command_path(name: str) -> str:
    """Return the path of a command in the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


@contextmanager
def worker(
    model: str, env: Mapping[str, str], log: Path, *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the Procfile's worker line for a model, and wait until the worker takes tasks.

    Args:
      model: the queue.
      env: environment variables to add.
      log: file for the output.
      options: more options of `celery worker`.
    """
    name = f"{model}-{free_port()}@test"
    command = [
        command_path("celery"),
        "-A",
        "tasks",
        "worker",
        "-Q",
        model,
        "-n",
        name,
        "-l",
        "INFO",
        *options,
    ]
    ready = f"{name} ready."
    with process([*command, "--without-gossip", "--without-mingle"], env, log) as popen:
        wait_until(lambda: ready in log.read_text(errors="replace") or popen.poll() is not None, 60)
        assert popen.poll() is None, log.read_text(errors="replace")
        yield popen


@contextmanager
def web(env: Mapping[str, str], log: Path) -> Iterator[str]:
    """Run the web tier with gunicorn, in one process; yields its host and port."""
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--config", "web/gunicorn_conf.py"]
    settings = {"INFERNO_SERVER__PORT": str(port), "INFERNO_SERVER__PROCESSES": "1"}

    def answers() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    with process([*command, "web.app:create_app()"], {**settings, **env}, log) as popen:
        wait_until(lambda: answers() or popen.poll() is not None)
        assert popen.poll() is None, log.read_text(errors="replace")
        yield f"127.0.0.1:{port}"


#: The program itself: Debian's wrapper on the PATH first switches to another user.
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


@contextmanager
def rabbitmq_server(folder: Path, port: int = 0) -> Iterator[str]:
    """Run a RabbitMQ server that shares nothing with an installed one; yields its URL.

    With the same folder and port, it continues with its data on disk.
    """
    port, epmd_port = port or free_port(), free_port()
    env = {
        "HOME": str(folder),  # Holds the cookie that authenticates nodes.
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd_port),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "none.conf"),
        "RABBITMQ_CONFIG_FILE": str(folder / "none"),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_NODENAME": f"test-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
    }
    (folder / "enabled_plugins").write_text("[].")
    log = folder / "rabbitmq.log"
    log.unlink(missing_ok=True)
    # Without an epmd, RabbitMQ starts one that outlives it.
    with (
        process(["epmd"], env, folder / "epmd.log") as epmd,
        process([str(RABBITMQ)], env, log) as popen,
    ):
        wait_until(
            lambda: b"Server startup complete" in log.read_bytes() or popen.poll() is not None, 60
        )
        assert epmd.poll() is None, (folder / "epmd.log").read_text()
        assert popen.poll() is None, log.read_text()
        yield f"amqp://guest:guest@127.0.0.1:{port}//"
