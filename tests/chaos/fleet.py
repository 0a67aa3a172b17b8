"""The platform's processes, each of which may be killed at any time: Redis, web and the workers.

The suite starts them itself, by the Procfile's lines: `inferno up` would give each model one
worker, and hide Redis from whoever wants to kill it. What dies is started again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Literal

import psutil
import redis
import yaml

from inferno.operate.embedded_redis import RIGHTS, EmbeddedRedis, prepare
from inferno.operate.ports import free_port
from inferno.settings import RedisSettings, Settings
from inferno.testing.processes import ROOT, command_path, wait_until
from tests.chaos.http import CUT, Connection
from tests.chaos.load import MODEL

PACKAGE = Path(__file__).with_name("model")
#: The suite's own connections to Redis; they are never cut.
CLIENT_NAME = "chaos"


@dataclass
class Worker:
    """One start of a worker process."""

    #: Celery's node name, unique to the start.
    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    is_paused: bool = False
    #: Whether it was told or made to end.
    is_doomed: bool = False
    _is_ready: bool = field(default=False, init=False)

    @property
    def pid(self) -> int:
        """Of the process that runs the model: the pool has threads only."""
        return self.popen.pid

    def is_working(self) -> bool:
        """Return whether it takes tasks, as far as it can be known from outside."""
        if not self._is_ready:
            self._is_ready = f"{self.name} ready." in self.log.read_text(errors="replace")
        idle = self.is_paused or self.is_doomed
        return self._is_ready and not idle and self.popen.poll() is None


class Fleet:
    """Everything that runs; a context manager that leaves nothing behind."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int,
        broker: str | None,
        fsync: Literal["always", "everysec", "no"],
        pass_ms: tuple[float, float],
    ) -> None:
        """Prepare a platform.

        Args:
          folder: for its files.
          workers: of the one lane.
          broker: what INFERNO_BROKER__URL is set to; ``redis://`` means Celery's lists in the
            fleet's own Redis. None leaves it unset.
          fsync: of the append-only file.
          pass_ms: shortest and longest forward pass.
        """
        #: What the model notes of its passes.
        self.passes = folder / "passes.txt"
        self.port = free_port()
        self.workers: list[Worker] = []
        #: Ends of processes that nobody had asked for, in words.
        self.surprises: list[str] = []
        self._folder = folder
        self._embedded = self._prepare_redis(fsync)
        self.redis = redis.Redis.from_url(self._embedded.url, client_name=CLIENT_NAME)
        self._env = {
            "INFERNO_REDIS__URL": self._embedded.url,
            "INFERNO_SERVER__PORT": str(self.port),
            # A synchronous call for a task that is lost shall not hold its client up for long.
            "INFERNO_SERVER__SYNC_WAIT_MS": "5000",
            "INFERNO_DATA__DIR": str(folder),
            "INFERNO_REPOSITORY__ROOT": str(self._repository(pass_ms)),
            "INFERNO_INFERENCE__DEVICE": "cpu",
            # So that a worker that is paused for longer loses its tasks, as one on a lost host.
            "INFERNO_WORKER__LEASE_S": "5",
        }
        if broker is not None:
            own = Settings(redis=RedisSettings(url=self._embedded.url)).backend_url
            self._env["INFERNO_BROKER__URL"] = own if broker == "redis://" else broker
        self._size = workers
        self._started = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._redis_process: subprocess.Popen[bytes] | None = None
        self._gunicorn: subprocess.Popen[bytes] | None = None
        self._closing = Event()
        self._keeper = Thread(target=self._keep)

    def __enter__(self) -> Fleet:
        """Start everything, and wait until it serves."""
        try:
            self._start_redis()
            self._start_gunicorn()
            self.workers = [self._start_worker() for _ in range(self._size)]
            self._keeper.start()
            self.wait_until_healthy()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kill everything."""
        self._close()

    def working(self) -> list[Worker]:
        """Return the workers that take tasks."""
        return [worker for worker in list(self.workers) if worker.is_working()]

    def wait_until_healthy(self, timeout_s: float = 60.0) -> None:
        """Wait until every worker takes tasks and the front end says that all is well."""
        wait_until(lambda: len(self.working()) == self._size, timeout_s, "all workers at work")
        wait_until(self._is_ready, timeout_s, "the front end ready")

    def kill(self, worker: Worker) -> None:
        """Kill a worker; returns when it is dead. Another is started in its place."""
        worker.is_doomed = True
        worker.popen.kill()
        worker.popen.wait()

    def terminate(self, worker: Worker) -> None:
        """Ask a worker to end; another is started when it has."""
        worker.is_doomed = True
        worker.popen.terminate()

    def pause(self, worker: Worker) -> None:
        """Stop a worker in the middle of what it does."""
        worker.is_paused = True
        worker.popen.send_signal(signal.SIGSTOP)

    def resume(self, worker: Worker) -> None:
        """Let a paused worker go on."""
        worker.popen.send_signal(signal.SIGCONT)
        worker.is_paused = False

    def web_processes(self) -> list[psutil.Process]:
        """Return gunicorn's workers."""
        assert self._gunicorn is not None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._gunicorn.pid).children()
        return []

    def restart_redis(self, away_s: float) -> None:
        """Kill Redis, and start it again on its files after so many seconds."""
        assert self._redis_process is not None
        self._redis_process.kill()
        self._redis_process.wait()
        self._closing.wait(away_s)
        self._start_redis()

    def connections(self, kind: str) -> list[str]:
        """Return the ids of the platform's connections to Redis, of one type of CLIENT LIST."""
        clients = self.redis.client_list(_type=kind)
        return [client["id"] for client in clients if client["name"] != CLIENT_NAME]

    def _prepare_redis(self, fsync: Literal["always", "everysec", "no"]) -> EmbeddedRedis:
        embedded = prepare(self._folder, RedisSettings(fsync=fsync))
        # The suite also cuts connections, which no client of the platform may do.
        config = embedded.config_path
        config.write_text(config.read_text().replace(RIGHTS, f"{RIGHTS} +client|kill"))
        return embedded

    def _repository(self, pass_ms: tuple[float, float]) -> Path:
        root = self._folder / "models"
        package = root / MODEL / "1"
        package.mkdir(parents=True)
        shutil.copy(PACKAGE / "model.py", package)
        manifest = yaml.safe_load((PACKAGE / "model.yaml").read_text())
        manifest["parameters"] = {"ledger": str(self.passes), "pass_ms": list(pass_ms)}
        (package / "model.yaml").write_text(yaml.safe_dump(manifest))
        return root

    def _start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self._env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append(popen)
        return popen

    def _start_redis(self) -> None:
        command = [str(self._embedded.program.path), str(self._embedded.config_path)]
        popen = self._start(command, self._folder / "redis.log")
        is_ready = self._embedded.wait_until_ready(lambda: popen.poll() is None)
        assert is_ready, (self._folder / "redis.log").read_text()
        self._redis_process = popen

    def _start_gunicorn(self) -> None:
        command = [
            command_path("gunicorn"),
            "--config",
            "web/gunicorn_conf.py",
            "web.app:create_app()",
        ]
        self._gunicorn = self._start(command, self._folder / "web.log")

    def _start_worker(self) -> Worker:
        self._started += 1
        name = f"{MODEL}-{self._started}@chaos"
        command = [command_path("celery"), "-A", "tasks", "worker", "-Q", MODEL, "-n", name]
        options = ["--loglevel", "INFO", "--without-gossip", "--without-mingle"]
        log = self._folder / f"worker-{self._started}.log"
        return Worker(name, self._start([*command, *options], log), log)

    def _keep(self) -> None:
        """Start again what has ended."""
        while not self._closing.wait(0.05):
            for place, worker in enumerate(self.workers):
                if worker.popen.poll() is not None:
                    if not worker.is_doomed:
                        self.surprises.append(f"{worker.name} ended: {worker.popen.returncode}")
                    self.workers[place] = self._start_worker()
            assert self._gunicorn is not None
            if self._gunicorn.poll() is not None:
                self.surprises.append(f"gunicorn ended: {self._gunicorn.returncode}")
                self._start_gunicorn()

    def _is_ready(self) -> bool:
        connection = Connection(self.port, timeout_s=5)
        try:
            return connection.call("GET", "/health/ready")[0] == 200
        except CUT:
            return False
        finally:
            connection.close()

    def _close(self) -> None:
        self._closing.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        for popen in self._processes:
            # The whole session: gunicorn's workers outlive their master for a while.
            with suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
        self.redis.close()
