"""Runs the Procfile's processes: starts them, restarts what dies, drains all of them at the end.

The supervisor is the terminal's process of `inferno up`. Each of its processes leads a session of
its own, so Ctrl-C reaches the supervisor alone, and writes to a log file of its own: a pipe would
leave a draining worker hanging once its reader is gone. One that dies is started again, later each
time, and never takes the others along.

Stopping goes stage by stage: the front end stops accepting, then workers finish what they hold,
then Redis, which they need until the end. SIGTERM goes to leaders only, because a signal to the
group kills pool children in the middle of a task; the group gets SIGKILL when the grace period is
over. A supervisor that is itself killed cannot do any of that, so a guard process, which knows the
running leaders, notices the end of its standard input and stops them in the same way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from types import FrameType
from typing import IO, Literal, Protocol

from inferno.errors import ConfigurationError

#: How often the supervisor looks at its processes.
TICK_S = 0.1
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


Level = Literal["info", "warning", "error"]


class Stage(IntEnum):
    """When a process stops; stages start in the opposite order."""

    #: Takes requests, or watches: web, flower.
    FRONT_END = 0
    #: Drains what it holds.
    WORKER = 1
    #: What the others need until they have ended. Started first, and waited for: Redis.
    STORE = 2


class EventKind(Enum):
    """What happened to a process."""

    STARTED = "started"
    #: It ended by itself, and is started again.
    DIED = "died"
    #: It has died FAILURES_TO_REPORT times in a row and never ran for long.
    FAILING = "failing"
    STOPPING = "stopping"
    #: It was still there at the end of the grace period.
    KILLED = "killed"
    STOPPED = "stopped"
    #: One line of its log, with ``follow=True``.
    OUTPUT = "output"
    #: About the supervisor itself.
    NOTE = "note"


@dataclass(frozen=True)
class Event:
    """Something the operator may want to see."""

    kind: EventKind
    #: The name of the process; "inferno" for the supervisor itself.
    process: str
    #: A complete sentence, or for OUTPUT the line itself.
    message: str
    level: Level = "info"
    #: The last lines of the log, where they explain the message.
    log_lines: tuple[str, ...] = ()

    def text(self, *, colour: bool = False) -> str:
        """Return it for a terminal, each line behind its ``name |``."""
        prefix = f"{self.process:<12} |"
        if colour:
            # The same name gets the same colour in every run; 31, red, is left for errors.
            shade = 32 + sum(self.process.encode()) % 5
            prefix = f"\x1b[{31 if self.level == 'error' else shade}m{prefix}\x1b[0m"
        lines = (self.message, *(f"  > {line}" for line in self.log_lines))
        return "\n".join(f"{prefix} {line}" for line in lines)


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


class _Leader(Protocol):
    """A started process, as the code that stops it sees it."""

    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def stage(self) -> Stage: ...
    def running(self) -> bool: ...


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


class _Orphan:
    """A process that the guard watches without being its parent."""

    def __init__(self, name: str, pid: int, stage: Stage) -> None:
        self.name, self.pid, self.stage = name, pid, stage
        # A pid may be given to a stranger once its process has ended; a pidfd stays with the one.
        # macOS has none.
        self._pidfd: int | None = None
        if hasattr(os, "pidfd_open"):
            with suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(pid)

    def running(self) -> bool:
        if self._pidfd is not None:
            return not select.select([self._pidfd], [], [], 0)[0]
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def forget(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)


def parse_procfile(text: str) -> dict[str, str]:
    """Return the commands of a Procfile by process name, in the file's order.

    Raises:
      ConfigurationError: a line is neither ``name: command``, a comment nor empty.
    """
    commands: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.fullmatch(r"([A-Za-z0-9_-]+):\s*(\S.*?)\s*", line)
        if found is None:
            raise ConfigurationError(f"Procfile, line {number}: expected `name: command`: {line}")
        if found[1] in commands:
            raise ConfigurationError(f"Procfile, line {number}: {found[1]} is there twice.")
        commands[found[1]] = found[2]
    return commands


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
                f"The data directory {self._data_dir} is in use{_by_whom({str(path)})}. Stop that "
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
        for event in _stop_in_order(
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
        _kill_group(process.popen.pid)
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
        if self._guard is not None:
            self._guard.communicate()
            self._emit(EventKind.NOTE, "inferno", "The guard process ended; replaced.", "warning")
        assert self._lock_file is not None
        root = str(Path(__file__).resolve().parents[1])
        with self.log_path("supervisor").open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "inferno.supervisor", str(self._grace_s)],
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


# -- Stopping, for the supervisor and for its guard ------------------------------------------------


def _stop_in_order(
    leaders: Iterable[_Leader],
    grace_s: float,
    *,
    hastened: Callable[[], bool] = lambda: False,
    each_tick: Callable[[], None] = lambda: None,
) -> Iterator[Event]:
    """Stop stage after stage, in each the newest first, telling what happens."""
    newest_first = list(leaders)[::-1]
    for stage in sorted(Stage):
        waiting = [leader for leader in newest_first if leader.stage is stage]
        for leader in waiting:
            if leader.running():
                with suppress(ProcessLookupError):
                    os.kill(leader.pid, signal.SIGTERM)
        began = time.monotonic()
        while waiting:
            each_tick()
            after = f"after {time.monotonic() - began:.1f} s"
            for leader in [leader for leader in waiting if not leader.running()]:
                # What a leader leaves behind has no one to drain it.
                _kill_group(leader.pid)
                waiting.remove(leader)
                yield Event(EventKind.STOPPED, leader.name, f"Stopped {after}.")
            # Redis is never hastened: it needs but a moment to write what it holds.
            in_haste = hastened() and stage is not Stage.STORE
            if in_haste or time.monotonic() - began > grace_s:
                break
            time.sleep(TICK_S if waiting else 0)
        for leader in waiting:
            _kill_group(leader.pid)
            message = f"Killed: it had not finished {after}."
            yield Event(EventKind.KILLED, leader.name, message, "warning")
        while any(leader.running() for leader in waiting):
            time.sleep(TICK_S)


def _kill_group(pid: int) -> None:
    # macOS refuses a group of which only a zombie is left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _describe_status(returncode: int) -> str:
    if returncode >= 0:
        return f"status {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def _guard(reports: IO[str], grace_s: float) -> None:
    """Stop what a supervisor leaves when it is gone.

    Args:
      reports: one JSON line ``[[name, pid, stage], ...]`` whenever the running leaders change. A
        supervisor that stops in good order ends with an empty one.
      grace_s: how long each stage may drain.
    """
    left: dict[int, _Orphan] = {}
    for line in reports:
        running = {pid: (name, Stage(stage)) for name, pid, stage in json.loads(line)}
        for pid in left.keys() - running.keys():
            left.pop(pid).forget()
        for pid, (name, stage) in running.items():
            if pid not in left:
                left[pid] = _Orphan(name, pid, stage)
    if left:
        print(f"{time.ctime()} The supervisor is gone; stopping what it left.")
    for event in _stop_in_order(left.values(), grace_s):
        print(event.text())


# -- The port, before the web tier is started ------------------------------------------------------


def check_port(host: str, port: int, variable: str) -> None:
    """Make sure that a process could listen there.

    Args:
      host: the address, such as ``127.0.0.1``.
      port: the port; 0 is always free.
      variable: the setting that chooses the port, for the error's advice.

    Raises:
      ConfigurationError: it could not; says who has the port, as far as this user may know.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise ConfigurationError(
            f"{host} is not an address to listen on: {exc.strerror}."
        ) from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # As gunicorn does it: connections that still wait to be forgotten do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise ConfigurationError(
                    f"Port {port} on {host} cannot be used: {exc.strerror}. "
                    f"Set {variable} to another port."
                ) from None
            raise ConfigurationError(
                f"Port {port} on {host} is in use{_by_whom(_listening_sockets(port))}. "
                f"Stop that process or set {variable} to another port."
            ) from None


def _listening_sockets(port: int) -> set[str]:
    """Return the sockets that listen on a port, as /proc names them."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with suppress(OSError):
            for row in table.read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = row.split()[:10]
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{inode}]")
    return sockets


def _by_whom(files: set[str]) -> str:
    """Return `` by process 12 (name)``, the oldest that has one of the files open.

    Empty where /proc does not tell: on macOS, or for another user's process.
    """
    with suppress(OSError):
        for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda entry: int(entry.name)):
            with suppress(OSError):
                if any(os.readlink(fd) in files for fd in (process / "fd").iterdir()):
                    return f" by process {process.name} ({(process / 'comm').read_text().strip()})"
    return ""


if __name__ == "__main__":
    _guard(sys.stdin, float(sys.argv[1]))
