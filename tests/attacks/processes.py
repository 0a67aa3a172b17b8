"""The platform's processes while it is attacked: which ones live, and how much memory they use."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import psutil

#: Time between two samples, in seconds.
EVERY_S = 0.2

#: By name: what the command line of a process contains.
KINDS = {
    "web": r"gunicorn|inferno\.serve|web\.app",
    "flower": r" flower",
    "redis": r"redis-server",
    "guard": r"guard",
    "webhooks": r"-Q webhooks",
    "worker": r"-Q \S+",
}


@dataclass(frozen=True)
class Memory:
    """Resident memory of one process, in megabytes; 0 where it did not exist."""

    name: str
    pid: int
    before: int
    peak: int
    after: int


def processes(supervisor: int) -> dict[int, str]:
    """Return the processes below a supervisor by pid, with their names."""
    found = {}
    for process in psutil.Process(supervisor).children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = _name(" ".join(process.cmdline()))
    return found


def _name(command: str) -> str:
    for name, pattern in KINDS.items():
        if re.search(pattern, command):
            lane = re.search(r"-Q (\S+)", command)
            return f"worker {lane[1]}" if name == "worker" and lane else name
    return "other"


def memory_mb(pids: Iterable[int]) -> dict[int, int]:
    """Return the resident memory of processes, in megabytes."""
    used = {}
    for pid in pids:
        with suppress(psutil.Error):
            used[pid] = psutil.Process(pid).memory_info().rss // 1_000_000
    return used


class Watch:
    """Samples the memory of processes, from a thread, until the end of the `with` block."""

    def __init__(self, supervisor: int) -> None:
        """Store whose processes to watch.

        Args:
          supervisor: pid of `inferno up`.
        """
        self._supervisor = supervisor
        self.before = processes(supervisor)
        self.before_mb = memory_mb(self.before)
        #: Every process seen, by pid.
        self.seen = dict(self.before)
        self.peak_mb = dict(self.before_mb)
        self.after_mb: dict[int, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        now = processes(self._supervisor)
        self.seen |= now
        self.after_mb = memory_mb(now)

    @property
    def died(self) -> list[str]:
        """Names of the processes that are gone."""
        return sorted(name for pid, name in self.before.items() if pid not in self.after_mb)

    @property
    def memory(self) -> list[Memory]:
        """Memory of every process that was seen."""
        columns = (self.before_mb, self.peak_mb, self.after_mb)
        return [
            Memory(name, pid, *(column.get(pid, 0) for column in columns))
            for pid, name in sorted(self.seen.items(), key=lambda item: item[::-1])
        ]

    def _run(self) -> None:
        while not self._done.wait(EVERY_S):
            self.seen |= (now := processes(self._supervisor))
            for pid, used in memory_mb(now).items():
                self.peak_mb[pid] = max(self.peak_mb.get(pid, 0), used)
