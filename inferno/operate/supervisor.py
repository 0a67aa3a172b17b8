"""Runs the Procfile's processes: starts them, restarts those that die, and stops them all.

The supervisor is the process of `inferno up` in the terminal. Each supervised process leads a
session of its own, so Ctrl-C only reaches the supervisor. Each writes to a log of its own, through
`inferno.operate.log_writer`, which outlives a killed supervisor: a draining worker can always
write. A process that dies is restarted after a growing delay, and never takes others down.

`inferno.operate.guard` stops the processes, even if the supervisor is killed.
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
from inferno.operate.logs import Logs
from inferno.operate.ports import file_user

#: Longest delay before a restart, in seconds; the delays are 1, 2, 4, ... seconds.
LONGEST_BACKOFF_S = 30.0
#: After a run of this many seconds, a death starts the backoff anew.
STABLE_S = 60.0
#: A death within this many seconds of the start is reported with the last log lines.
QUICK_DEATH_S = 10.0
#: This many deaths in a row without a stable run mean a broken package.
FAILURES_TO_REPORT = 5
#: Stop requests within this many seconds count as one: a wrapper such as make forwards Ctrl-C.
SAME_REQUEST_S = 0.5

# The leader waits for a line, which the supervisor sends once the guard knows the leader's pid.
# Without it (the supervisor was killed in between) the command never runs. `exec` keeps the pid;
# `env` allows `NAME=value command`.
_LAUNCH = "read -r go || exit; exec </dev/null; exec env {command}"


@dataclass(frozen=True)
class ProcessSpec:
    """A process to keep running."""

    #: Unique name, also of the log file: letters, digits, ``.``, ``_`` and ``-``.
    name: str
    #: One simple shell command, as in a Procfile.
    command: str
    #: Variables added to the supervisor's environment.
    env: Mapping[str, str] = field(default_factory=dict)
    stage: Stage = Stage.WORKER
    #: Only for STORE: waits until the process is ready; returns False when that fails. The argument
    #: tells whether the process is running.
    wait_until_ready: Callable[[Callable[[], bool]], bool] | None = None


@dataclass
class _Process:
    """A supervised process: its spec and its present run."""

    spec: ProcessSpec
    popen: subprocess.Popen[bytes] | None = None
    #: Monotonic time of the last start, in seconds.
    started_at: float = 0.0
    #: Size of the log at the last start, in bytes.
    log_start: int = 0
    #: Monotonic time of the next start, in seconds.
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
        log_bytes: int = 20_000_000,
        logs_kept: int = 5,
    ) -> None:
        """Store the configuration; `start` or `run_forever` acts.

        Args:
          data_dir: holds ``logs/`` and the lock; only one supervisor at a time uses it.
          cwd: working directory of the commands: the Procfile's directory.
          grace_s: time that each stage has to finish before it is killed, in seconds.
          on_event: called from the supervising thread.
          follow: also report each line of the processes' logs, as OUTPUT events.
          log_bytes: size at which a process's log goes on in a new file.
          logs_kept: number of older files to keep for each process.
        """
        self._data_dir = data_dir.resolve()
        self._logs = Logs(self._data_dir / "logs", log_bytes, logs_kept)
        self._cwd = cwd
        self._grace_s = grace_s
        self._on_event = on_event
        self._follow = follow
        self._processes: dict[str, _Process] = {}
        self._lock_file: IO[str] | None = None
        self._guard: subprocess.Popen[str] | None = None

        self._stop_requests = 0
        self._last_request_at = 0.0

    # -- Processes --------------------------------------------------------------------------------

    def add(self, spec: ProcessSpec) -> None:
        """Add a process; a running `run_forever` starts it within a tick."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", spec.name):
            raise ConfigurationError(
                f"{spec.name!r} cannot name a process, because it must also name a log file."
            )
        if spec.name in self._processes:
            raise ConfigurationError(f"Two processes are named {spec.name}.")
        self._processes[spec.name] = _Process(spec)

    def log_path(self, name: str) -> Path:
        """Return the file that holds a process's output."""
        return self._logs.path(name)

    def pids(self) -> dict[str, int]:
        """Return the process id of each running process, by name."""
        return {process.name: process.pid for process in self._started()}

    # -- Start and stop ---------------------------------------------------------------------------

    def lock(self) -> None:
        """Lock the data directory; `start` does it too.

        Raises:
          ConfigurationError: another platform, or the rest of one, uses the directory.
        """
        if self._lock_file is not None:
            return
        self._make_private_directory()
        path = self._data_dir / "supervisor.lock"
        path.touch(0o600)
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigurationError(
                f"The data directory {self._data_dir} is in use{file_user(path)}. Stop that "
                "platform (it may be stopping already), or set INFERNO_DATA__DIR to another "
                "directory."
            ) from None
        self._lock_file = file

    def start(self) -> None:
        """Start every process that was added: the stores first, the others once these are ready.

        Raises:
          ConfigurationError: the data directory is in use, or a store does not get ready; no
            process is left running.
        """
        self.lock()
        try:
            self._logs.start()
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
        """Start, keep every process running until SIGTERM, SIGINT or `request_stop`, then stop."""
        with self._handling_signals():
            self.start()
            try:
                while not self._stop_requests:
                    self._tick()
                    time.sleep(TICK_S)
            finally:
                self.stop()

    def request_stop(self) -> None:
        """Make `run_forever` stop every process and return; a second call makes it kill them."""
        # Signal handlers call it, so it takes no lock.
        now = time.monotonic()
        if now - self._last_request_at > SAME_REQUEST_S:
            self._stop_requests += 1
            self._last_request_at = now

    def stop(self) -> None:
        """Stop every process, stage by stage, and release the data directory."""
        started = self._started()
        if started:
            message = "Finishing running work, then stopping. Press Ctrl-C again to kill it."
            self._emit(EventKind.STOPPING, "inferno", message)
        for event in stop_in_order(
            started,
            self._grace_s,
            hastened=lambda: self._stop_requests > 1,
            each_tick=self._follow_logs,
        ):
            self._report(event)
        self._logs.stop()
        self._follow_logs()
        self._logs.close()
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

    def _make_private_directory(self) -> None:
        """Make the data directory, which only this user may enter."""
        try:
            self._data_dir.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            # A directory that is not the platform's alone, such as /tmp, keeps its mode.
            is_ours = (self._data_dir / "supervisor.lock").exists()
            if is_ours and self._data_dir.stat().st_uid == os.geteuid():
                self._data_dir.chmod(0o700)

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
        # Even if the terminal is gone, every process must be stopped.
        with suppress(OSError):
            self._on_event(event)

    def _started(self) -> list[_Process]:
        return [p for p in list(self._processes.values()) if p.popen is not None]

    def _tick(self) -> None:
        self._watch_guard()
        if self._logs.tend():
            note = "Replaced the writer of the logs, which ended."
            self._emit(EventKind.NOTE, "inferno", note, "warning")
        for process in list(self._processes.values()):
            if process.popen is None:
                if time.monotonic() >= process.due_at:
                    self._spawn(process)
            elif not process.running():
                self._handle_death(process)
        self._follow_logs()

    def _spawn(self, process: _Process) -> None:
        spec = process.spec
        # A store keeps the data directory locked while it runs, even if the supervisor is killed.
        assert self._lock_file is not None
        kept = (self._lock_file.fileno(),) if spec.stage is Stage.STORE else ()
        with self._logs.open(spec.name) as log:
            process.log_start = self._logs.size(spec.name)
            process.popen = subprocess.Popen(
                ["/bin/sh", "-c", _LAUNCH.format(command=spec.command)],
                stdin=subprocess.PIPE,
                stdout=log.fileno(),
                stderr=log.fileno(),
                cwd=self._cwd,
                env=self._environment(spec),
                start_new_session=True,
                pass_fds=kept,
                # A store's files hold the inputs of tasks: they are for this user only.
                umask=0o077 if spec.stage is Stage.STORE else -1,
            )
        process.started_at = time.monotonic()
        self._tell_guard()
        assert process.popen.stdin is not None
        with suppress(BrokenPipeError):
            process.popen.stdin.write(b"go\n")
            process.popen.stdin.close()
        self._emit(EventKind.STARTED, spec.name, f"Started, process {process.popen.pid}.")

    def _environment(self, spec: ProcessSpec) -> dict[str, str]:
        # `celery` must come from this Python's environment, whether or not it is activated.
        own_bin = str(Path(sys.executable).parent)
        path = os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **spec.env}

    def _await_store(self, process: _Process) -> None:
        wait = process.spec.wait_until_ready
        if wait is None:
            return
        if wait(lambda: process.running() and not self._stop_requests) or self._stop_requests:
            return
        if not process.running():
            self._logs.finish(process.name)
        self._follow_logs()
        lines = "\n  > ".join(self._last_lines(process))
        raise ConfigurationError(
            f"{process.spec.name} did not start. Its log {self.log_path(process.spec.name)} ends:"
            f"\n  > {lines}"
        )

    def _handle_death(self, process: _Process) -> None:
        """Kill the rest of a dead process's group, plan its restart and report the death."""
        assert process.popen is not None
        kill_group(process.popen.pid)
        self._logs.finish(process.name)
        self._follow_logs()
        lived_s = time.monotonic() - process.started_at
        status = _describe_status(process.popen.returncode)
        process.popen = None
        self._tell_guard()
        if lived_s >= STABLE_S:
            process.failures, process.was_stable = 0, True
        process.failures += 1
        delay_s = min(2.0 ** (process.failures - 1), LONGEST_BACKOFF_S)
        process.due_at = time.monotonic() + delay_s
        message = f"Ended with {status} after {lived_s:.1f} s; restarts in {delay_s:.0f} s."
        lines = self._last_lines(process) if lived_s < QUICK_DEATH_S else ()
        self._emit(EventKind.DIED, process.spec.name, message, "warning", lines)
        if process.failures == FAILURES_TO_REPORT and not process.was_stable:
            self._emit(
                EventKind.FAILING,
                process.spec.name,
                f"Failed {process.failures} times in a row without a stable run. Other processes "
                f"are not affected. It is restarted every {LONGEST_BACKOFF_S:.0f} s. "
                f"Log: {self.log_path(process.spec.name)}",
                "error",
            )

    def _last_lines(self, process: _Process) -> tuple[str, ...]:
        return self._logs.last_lines(process.spec.name, process.log_start)

    def _follow_logs(self) -> None:
        """Report the new lines of every log."""
        if not self._follow:
            return
        for process in list(self._processes.values()):
            name = process.spec.name
            if process.popen is not None or self._logs.follows(name):
                for line in self._logs.new_lines(name, process.log_start):
                    self._emit(EventKind.OUTPUT, name, line)

    def _watch_guard(self) -> None:
        """Start the guard, or replace it if it ended."""
        if self._guard is not None and self._guard.poll() is None:
            return
        ended = self._guard
        if ended is not None:
            ended.communicate()
        assert self._lock_file is not None
        root = str(Path(__file__).resolve().parents[2])
        with self._logs.open_own() as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "inferno.operate.guard", str(self._grace_s)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                # The guard keeps the lock until it has stopped a killed supervisor's processes.
                pass_fds=(self._lock_file.fileno(),),
            )
        self._tell_guard()
        if ended is not None:
            self._emit(EventKind.NOTE, "inferno", "Replaced the guard, which ended.", "warning")

    def _tell_guard(self) -> None:
        """Send the running leaders to the guard."""
        assert self._guard is not None
        assert self._guard.stdin is not None
        leaders = [[process.name, process.pid, process.stage] for process in self._started()]
        # A guard that died is replaced, and told, at the next tick.
        with suppress(BrokenPipeError):
            self._guard.stdin.write(json.dumps(leaders) + "\n")
            self._guard.stdin.flush()

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Turn stop signals into `request_stop`. Only possible in the main thread."""
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
