"""Runs the Procfile's processes: starts them, restarts what dies, drains all of them at the end.

The supervisor is the terminal's process of `inferno up`. Each of its processes leads a session of
its own, so Ctrl-C reaches the supervisor alone, and writes to a log file of its own: a pipe would
leave a draining worker hanging once its reader is gone. One that dies is started again, later each
time, and never takes the others along.

`inferno.operate.guard` says how processes are stopped, also when the supervisor is itself killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from inferno.errors import ConfigurationError
from inferno.operate.guard import TICK_S, Event, EventKind, Level, Stage, kill_group, stop_in_order
from inferno.operate.ports import by_whom

#: A process that dies is restarted after 1, 2, 4, ... seconds, never more than this.
LONGEST_BACKOFF_S = 30.0
#: A process that ran this long is sound: its next death starts the backoff anew.
STABLE_S = 60.0
#: A process that dies sooner after its start has its last log lines shown.
QUICK_DEATH_S = 10.0
#: Deaths in a row, none of them after a stable run, that mean a broken package.
FAILURES_TO_REPORT = 5
#: A second Ctrl-C hastens, unless it is the same one, forwarded by a wrapper such as make.
SAME_REQUEST_S = 0.5
#: Log files larger than this are moved to ``<name>.log.1`` when their process starts.
ROTATE_BYTES = 10 * 1024 * 1024

# The leader waits for a line, which comes once the guard knows its pid; without one (the supervisor
# was killed in between) it never runs. `exec` keeps the pid; `env` allows `NAME=value command`.
_LAUNCH = "read -r go || exit; exec </dev/null; exec env {command}"


@dataclass(frozen=True)
class ProcessSpec:
    """A process to be kept running."""

    #: Unique; also names its log file, so it may hold letters, digits, ``.``, ``_`` and ``-``.
    name: str
    #: One simple shell command, as in a Procfile.
    command: str
    #: Added to the supervisor's environment.
    env: Mapping[str, str] = field(default_factory=dict)
    stage: Stage = Stage.WORKER
    #: For STORE: waits until it serves, given a function that tells whether it still runs.
    wait_until_ready: Callable[[Callable[[], bool]], bool] | None = None


@dataclass
class _Process:
    """A spec and its present life; the supervisor's view of a leader."""

    spec: ProcessSpec
    popen: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    #: Where its log stood when it was last started.
    log_start: int = 0
    due_at: float = 0.0
    #: Deaths in a row since the last stable run.
    failures: int = 0
    was_stable: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def stage(self) -> Stage:
        return self.spec.stage

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None


class Supervisor:
    """Keeps processes running until it is asked to stop, then leaves none behind."""

    def __init__(
        self,
        data_dir: Path,
        *,
        cwd: Path,
        grace_s: float = 30.0,
        on_event: Callable[[Event], None] = lambda event: None,
        follow: bool = False,
    ) -> None:
        """Store what to do; `start` or `run_forever` does it.

        Args:
          data_dir: holds ``logs/`` and the lock; one supervisor at a time uses it.
          cwd: where the commands run: the Procfile's directory.
          grace_s: how long each stage may drain before it is killed.
          on_event: called from the supervising thread.
          follow: also report each line of the processes' logs, as OUTPUT events.
        """
        self._data_dir = data_dir.resolve()
        self._cwd = cwd
        self._grace_s = grace_s
        self._on_event = on_event
        self._follow = follow
        self._processes: dict[str, _Process] = {}
        self._lock_file: IO[str] | None = None
        self._guard: subprocess.Popen[str] | None = None
        self._followed: dict[str, tuple[IO[bytes], bytes]] = {}
        self._stop_requests = 0
        self._last_request_at = 0.0

    # -- What runs --------------------------------------------------------------------------------

    def add(self, spec: ProcessSpec) -> None:
        """Add a process; `run_forever` starts it within a tick when it is already running."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", spec.name):
            raise ConfigurationError(f"{spec.name!r} cannot name a process: it names its log file.")
        if spec.name in self._processes:
            raise ConfigurationError(f"There are two processes called {spec.name}.")
        self._processes[spec.name] = _Process(spec)

    def log_path(self, name: str) -> Path:
        """Return the file that holds what a process prints."""
        return self._data_dir / "logs" / f"{name}.log"

    def pids(self) -> dict[str, int]:
        """Return the process id of each running process, by name."""
        return {process.name: process.pid for process in self._started()}

    # -- Life -------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Claim the data directory; `start` does it too.

        Raises:
          ConfigurationError: another platform, or the rest of one, uses it.
        """
        if self._lock_file is not None:
            return
        self._data_dir.mkdir(parents=True, exist_ok=True)
        path = self._data_dir / "supervisor.lock"
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigurationError(
                f"The data directory {self._data_dir} is in use{by_whom({str(path)})}. Stop that "
                "platform (it may be finishing already) or set INFERNO_DATA__DIR to another one."
            ) from None
        self._lock_file = file

    def start(self) -> None:
        """Start everything that was added: the stores first, the rest once those serve.

        Raises:
          ConfigurationError: the data directory is taken, or a store does not come up; nothing is
            left running then.
        """
        self.lock()
        self.log_path("any").parent.mkdir(parents=True, exist_ok=True)
        try:
            self._watch_guard()
            for stage in sorted(Stage, reverse=True):
                for process in list(self._processes.values()):
                    if self._stop_requests:
                        return
                    if process.stage is stage and process.popen is None:
                        self._spawn(process)
                        self._await_store(process)
        except BaseException:
            self.stop()
            raise

    def run_forever(self) -> None:
        """Start, keep everything running until SIGTERM, SIGINT or `request_stop`, then stop."""
        with self._handling_signals():
            self.start()
            try:
                while not self._stop_requests:
                    self._tick()
                    time.sleep(TICK_S)
            finally:
                self.stop()

    def request_stop(self) -> None:
        """Make `run_forever` stop everything and return; asked again, make it hurry."""
        # Called by signal handlers, so it takes no lock.
        now = time.monotonic()
        if now - self._last_request_at > SAME_REQUEST_S:
            self._stop_requests += 1
            self._last_request_at = now

    def stop(self) -> None:
        """Stop everything, stage by stage; return when nothing is left."""
        started = self._started()
        if started:
            message = "Stopping once running work is done. Ctrl-C again kills what is not done."
            self._emit(EventKind.STOPPING, "inferno", message)
        for event in stop_in_order(
            started,
            self._grace_s,
            hastened=lambda: self._stop_requests > 1,
            each_tick=self._follow_logs,
        ):
            self._report(event)
        self._follow_logs()
        for file, _ in self._followed.values():
            file.close()
        self._followed.clear()
        for process in started:
            process.popen = None
        if self._guard is not None:
            self._tell_guard()
            self._guard.communicate()
            self._guard = None
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    # -- Inside -----------------------------------------------------------------------------------

    def _emit(
        self,
        kind: EventKind,
        process: str,
        message: str,
        level: Level = "info",
        log_lines: tuple[str, ...] = (),
    ) -> None:
        self._report(Event(kind, process, message, level, log_lines))

    def _report(self, event: Event) -> None:
        # The terminal may be gone; that must not keep anything from being stopped.
        with suppress(OSError):
            self._on_event(event)

    def _started(self) -> list[_Process]:
        return [p for p in list(self._processes.values()) if p.popen is not None]

    def _tick(self) -> None:
        self._watch_guard()
        for process in list(self._processes.values()):
            if process.popen is None:
                if time.monotonic() >= process.due_at:
                    self._spawn(process)
            elif not process.running():
                self._follow_logs()
                self._bury(process)
        self._follow_logs()

    def _spawn(self, process: _Process) -> None:
        spec = process.spec
        path = self.log_path(spec.name)
        if path.exists() and path.stat().st_size > ROTATE_BYTES:
            path.replace(path.with_suffix(".log.1"))
        # A store keeps the data directory's lock while it lives, whatever became of the supervisor.
        assert self._lock_file is not None
        kept = (self._lock_file.fileno(),) if spec.stage is Stage.STORE else ()
        with path.open("ab") as log:
            process.log_start = log.tell()
            process.popen = subprocess.Popen(
                ["/bin/sh", "-c", _LAUNCH.format(command=spec.command)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._cwd,
                env=self._environment(spec),
                start_new_session=True,
                pass_fds=kept,
            )
        process.started_at = time.monotonic()
        self._tell_guard()
        assert process.popen.stdin is not None
        with suppress(BrokenPipeError):
            process.popen.stdin.write(b"go\n")
            process.popen.stdin.close()
        self._emit(EventKind.STARTED, spec.name, f"Started, process {process.popen.pid}.")

    def _environment(self, spec: ProcessSpec) -> dict[str, str]:
        # `celery` has to be the one beside this Python, whether or not its environment is active.
        own_bin = str(Path(sys.executable).parent)
        path = os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **spec.env}

    def _await_store(self, process: _Process) -> None:
        wait = process.spec.wait_until_ready
        if wait is None:
            return
        if wait(lambda: process.running() and not self._stop_requests) or self._stop_requests:
            return
        self._follow_logs()
        lines = "\n  > ".join(self._last_lines(process))
        raise ConfigurationError(
            f"{process.spec.name} did not come up. The end of {self.log_path(process.spec.name)}:"
            f"\n  > {lines}"
        )

    def _bury(self, process: _Process) -> None:
        """Note a death, remove what the leader left of its group, and plan the next start."""
        assert process.popen is not None
        kill_group(process.popen.pid)
        lived_s = time.monotonic() - process.started_at
        status = _describe_status(process.popen.returncode)
        process.popen = None
        self._tell_guard()
        if lived_s >= STABLE_S:
            process.failures, process.was_stable = 0, True
        process.failures += 1
        delay_s = min(2.0 ** (process.failures - 1), LONGEST_BACKOFF_S)
        process.due_at = time.monotonic() + delay_s
        message = f"Ended with {status} after {lived_s:.1f} s; starts again in {delay_s:.0f} s."
        lines = self._last_lines(process) if lived_s < QUICK_DEATH_S else ()
        self._emit(EventKind.DIED, process.spec.name, message, "warning", lines)
        if process.failures == FAILURES_TO_REPORT and not process.was_stable:
            self._emit(
                EventKind.FAILING,
                process.spec.name,
                f"Failed {process.failures} times in a row and has not come up once. The other "
                f"processes are not affected; it is tried again every {LONGEST_BACKOFF_S:.0f} s. "
                f"Its log: {self.log_path(process.spec.name)}",
                "error",
            )

    def _last_lines(self, process: _Process, count: int = 8) -> tuple[str, ...]:
        """Return the end of what the process printed in its last life."""
        with self.log_path(process.spec.name).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(process.log_start, size - 8192))
            lines = log.read().decode(errors="replace").splitlines()
        return tuple(line for line in lines if line.strip())[-count:]

    def _follow_logs(self) -> None:
        """Report each line that was added to a log since the last look."""
        if not self._follow:
            return
        for process in list(self._processes.values()):
            name = process.spec.name
            file, rest = self._followed.get(name, (None, b""))
            if file is None and process.popen is None:
                continue
            path = self.log_path(name)
            if file is None:
                file = path.open("rb")
                file.seek(process.log_start)
            *lines, rest = (rest + file.read()).split(b"\n")
            # Rotated at a restart: the old file is read to its end, the new one from the next look.
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                file.close()
                file = path.open("rb")
            self._followed[name] = (file, rest)
            for line in lines:
                self._emit(EventKind.OUTPUT, name, line.decode(errors="replace"))

    def _watch_guard(self) -> None:
        if self._guard is not None and self._guard.poll() is None:
            return
        ended = self._guard
        if ended is not None:
            ended.communicate()
        assert self._lock_file is not None
        root = str(Path(__file__).resolve().parents[2])
        with self.log_path("supervisor").open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "inferno.operate.guard", str(self._grace_s)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                # The guard keeps the lock until it has stopped what a killed supervisor left.
                pass_fds=(self._lock_file.fileno(),),
            )
        self._tell_guard()
        if ended is not None:
            self._emit(EventKind.NOTE, "inferno", "The guard process ended; replaced.", "warning")

    def _tell_guard(self) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        leaders = [[process.name, process.pid, process.stage] for process in self._started()]
        # A guard that died is replaced at the next tick, and told then.
        with suppress(BrokenPipeError):
            self._guard.stdin.write(json.dumps(leaders) + "\n")
            self._guard.stdin.flush()

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Take stop signals as requests; only the main thread can, others use `request_stop`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(signum: int, frame: FrameType | None) -> None:
            self.request_stop()

        signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {signum: signal.signal(signum, handle) for signum in signums}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _describe_status(returncode: int) -> str:
    if returncode >= 0:
        return f"status {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"
