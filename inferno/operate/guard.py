"""Stops processes stage by stage, even when their supervisor was killed.

First the front end stops accepting requests, then workers finish the tasks that they hold, then
Redis stops. SIGTERM only goes to leaders of process groups: sent to a group, it would kill pool
children in the middle of a task. The group gets SIGKILL when the grace period is over.

A killed supervisor cannot do any of that. Therefore it starts a guard: this module, run as a
process of its own. The guard knows the running leaders, notices the end of its standard input and
stops the leaders in the same way.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import IO, Literal, Protocol

import psutil

#: Time between two checks of the processes, in seconds.
TICK_S = 0.1

Level = Literal["info", "warning", "error"]


class Stage(IntEnum):
    """Order in which processes stop; they start in the opposite order."""

    #: Accepts requests or monitors: web, flower.
    FRONT_END = 0
    #: Finishes the tasks that it holds.
    WORKER = 1
    #: Redis, which all others need until they end. The others start once it is ready.
    STORE = 2


class EventKind(Enum):
    """What happened to a process."""

    STARTED = "started"
    #: Ended by itself, and will be restarted.
    DIED = "died"
    #: Died FAILURES_TO_REPORT times in a row and never ran for long.
    FAILING = "failing"
    STOPPING = "stopping"
    #: Still running at the end of the grace period.
    KILLED = "killed"
    STOPPED = "stopped"
    #: Wrote a line to its log; only with ``follow=True``.
    OUTPUT = "output"
    #: Concerns the supervisor itself.
    NOTE = "note"


@dataclass(frozen=True)
class Event:
    """A report to the operator."""

    kind: EventKind
    #: Name of the process; "inferno" for the supervisor itself.
    process: str
    #: A complete sentence; for OUTPUT, the log line.
    message: str
    level: Level = "info"
    #: The last lines of the log, if they explain the message.
    log_lines: tuple[str, ...] = ()

    def text(self, *, colour: bool = False) -> str:
        """Return the event for a terminal, each line after ``name |``."""
        prefix = f"{self.process:<12} |"
        if colour:
            # A name has the same colour in every run. Red (31) is reserved for errors.
            shade = 32 + sum(self.process.encode()) % 5
            prefix = f"\x1b[{31 if self.level == 'error' else shade}m{prefix}\x1b[0m"
        lines = (self.message, *(f"  > {line}" for line in self.log_lines))
        return "\n".join(f"{prefix} {line}" for line in lines)


class Leader(Protocol):
    """A started process that leads its process group."""

    @property
    def name(self) -> str:
        """Name of the process, for people."""

    @property
    def pid(self) -> int:
        """Id of the process and of its group."""

    @property
    def stage(self) -> Stage:
        """Stage in which the process stops."""

    def running(self) -> bool:
        """Whether the process is running."""


class _Orphan:
    """A process that the guard watches without being its parent."""

    def __init__(self, name: str, pid: int, stage: Stage) -> None:
        self.name, self.pid, self.stage = name, pid, stage
        # psutil compares start times, because a pid may go to another process after an end.
        self._process: psutil.Process | None = None
        with suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(pid)

    def running(self) -> bool:
        if self._process is None:
            return False
        try:
            # A zombie has ended, even if nothing has reaped it yet.
            ended = self._process.status() == psutil.STATUS_ZOMBIE
            return not ended and bool(self._process.is_running())
        except psutil.NoSuchProcess:
            return False


def stop_in_order(
    leaders: Iterable[Leader],
    grace_s: float,
    *,
    hastened: Callable[[], bool] = lambda: False,
    each_tick: Callable[[], None] = lambda: None,
) -> Iterator[Event]:
    """Stop processes stage by stage, in each stage the newest first.

    Args:
      leaders: the running processes, oldest first.
      grace_s: time that each stage has before it is killed, in seconds.
      hastened: tells whether to kill at once, because the operator is in a hurry.
      each_tick: called at every check.

    Yields:
      An event for each process that stopped or was killed.
    """
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
                # Children that the leader left have nothing to finish.
                kill_group(leader.pid)
                waiting.remove(leader)
                yield Event(EventKind.STOPPED, leader.name, f"Stopped {after}.")
            # Never hasten Redis: it only needs a moment to write its data.
            in_haste = hastened() and stage is not Stage.STORE
            if in_haste or time.monotonic() - began > grace_s:
                break
            time.sleep(TICK_S if waiting else 0)
        for leader in waiting:
            kill_group(leader.pid)
            message = f"Killed: not finished {after}."
            yield Event(EventKind.KILLED, leader.name, message, "warning")
        while any(leader.running() for leader in waiting):
            time.sleep(TICK_S)


def kill_group(pid: int) -> None:
    """Kill the remaining processes of a leader's group."""
    # macOS refuses a group that has only a zombie left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _guard(reports: IO[str], grace_s: float) -> None:
    """Stop the processes that a killed supervisor left.

    Args:
      reports: one JSON line ``[[name, pid, stage], ...]`` whenever the running leaders change. A
        supervisor that stops normally sends an empty list last.
      grace_s: time that each stage has to finish, in seconds.
    """
    left: dict[int, _Orphan] = {}
    for line in reports:
        running = {pid: (name, Stage(stage)) for name, pid, stage in json.loads(line)}
        for pid in left.keys() - running.keys():
            del left[pid]
        for pid, (name, stage) in running.items():
            if pid not in left:
                left[pid] = _Orphan(name, pid, stage)
    if left:
        print(f"{time.ctime()} The supervisor was killed; stopping the processes that it left.")
    for event in stop_in_order(left.values(), grace_s):
        print(event.text())


if __name__ == "__main__":
    _guard(sys.stdin, float(sys.argv[1]))
