"""How processes are stopped: stage by stage, and also when their supervisor is gone.

The front end stops accepting, then workers finish what they hold, then Redis, which they need until
the end. SIGTERM goes to leaders only, because a signal to the group kills pool children in the
middle of a task; the group gets SIGKILL when the grace period is over.

A supervisor that is itself killed cannot do any of that. So it has a guard, this module run as a
process of its own, which knows the running leaders, notices the end of its standard input, and
stops them in the same way.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import IO, Literal, Protocol

#: How often the supervisor looks at its processes.
TICK_S = 0.1

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


class Leader(Protocol):
    """A started process, as the code that stops it sees it."""

    @property
    def name(self) -> str:
        """Its name for people."""

    @property
    def pid(self) -> int:
        """Its process id, which is also its group's."""

    @property
    def stage(self) -> Stage:
        """When it stops."""

    def running(self) -> bool:
        """Whether it still runs."""


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


def stop_in_order(
    leaders: Iterable[Leader],
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
                kill_group(leader.pid)
                waiting.remove(leader)
                yield Event(EventKind.STOPPED, leader.name, f"Stopped {after}.")
            # Redis is never hastened: it needs but a moment to write what it holds.
            in_haste = hastened() and stage is not Stage.STORE
            if in_haste or time.monotonic() - began > grace_s:
                break
            time.sleep(TICK_S if waiting else 0)
        for leader in waiting:
            kill_group(leader.pid)
            message = f"Killed: it had not finished {after}."
            yield Event(EventKind.KILLED, leader.name, message, "warning")
        while any(leader.running() for leader in waiting):
            time.sleep(TICK_S)


def kill_group(pid: int) -> None:
    """Kill what is left of a leader's process group."""
    # macOS refuses a group of which only a zombie is left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


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
    for event in stop_in_order(left.values(), grace_s):
        print(event.text())


if __name__ == "__main__":
    _guard(sys.stdin, float(sys.argv[1]))
