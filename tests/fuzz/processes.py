"""The platform's processes, watched from outside: which ones live, and their memory."""

from __future__ import annotations

import re
import time

import psutil

#: What a process is, by its command line; only these must live.
ROLES = {
    "web": re.compile(r"gunicorn"),
    "worker": re.compile(r"celery.* worker "),
    "redis": re.compile(r"redis-server"),
}


class Processes:
    """The processes below a platform's supervisor that must live as long as it does."""

    def __init__(self, pid: int) -> None:
        """Find them.

        Args:
          pid: of the supervisor, `inferno up`.
        """
        self._supervisor = psutil.Process(pid)
        self._known = self._find()

    def dead(self) -> list[str]:
        """Return the processes that ended since the last call."""
        now = self._find()
        gone = [f"{role} {pid}" for pid, role in self._known.items() if pid not in now]
        self._known = now
        return gone

    def memory(self) -> dict[str, int]:
        """Return the resident memory of each process, in bytes, by role and process id."""
        sizes = {}
        for pid, role in self._find().items():
            try:
                sizes[f"{role} {pid}"] = int(psutil.Process(pid).memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        return sizes

    def growth(self, before: dict[str, int]) -> int:
        """Return how many bytes the process that grew most has grown."""
        return max(size - before.get(name, size) for name, size in self.memory().items())

    def settle(self, before: dict[str, int], most: int, timeout_s: float) -> int:
        """Return the growth once it is small enough, or after some time."""
        end = time.monotonic() + timeout_s
        while (grown := self.growth(before)) > most and time.monotonic() < end:
            time.sleep(0.5)
        return grown

    def _find(self) -> dict[int, str]:
        found = {}
        for process in self._supervisor.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            for role, pattern in ROLES.items():
                if pattern.search(line):
                    found[process.pid] = role
        return found
