"""A target's processes: their processor time and memory, and that none is left behind."""

from __future__ import annotations

import ctypes
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

_PR_SET_CHILD_SUBREAPER = 36
#: How long processes that a target left behind may take to end, in seconds, before they are killed.
GRACE_S = 5.0


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process, so that all of them are seen.

    Raises:
      OSError: the system does not support it; Linux does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def kind_of(command: str) -> str:
    """Return the kind of a process, by its command line."""
    for sign, kind in (
        ("redis-server", "redis"),
        ("gunicorn", "web"),
        ("-Q webhooks", "webhooks"),
        (" flower", "flower"),
        ("inferno.operate.guard", "supervisor"),
        ("inferno.operate.log_writer", "supervisor"),
        ("inferno up", "supervisor"),
        ("celery", "worker"),
    ):
        if sign in command:
            return kind
    return "server"


@dataclass(frozen=True)
class Process:
    """One process at one moment."""

    kind: str
    #: User and system time since its start, in seconds.
    cpu_s: float
    rss_bytes: int


#: Processes by id and start time, so that a reused id is another process.
Snapshot = Mapping[tuple[int, float], Process]


def snapshot() -> Snapshot:
    """Return the current state of all descendants of this process."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess), process.oneshot():
            times = process.cpu_times()
            found[process.pid, process.create_time()] = Process(
                kind_of(" ".join(process.cmdline())),
                times.user + times.system,
                process.memory_info().rss,
            )
    return found


def cpu_s(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """Return the processor time between two snapshots, in seconds, by kind of process.

    Processes that ended in between are not counted.
    """
    sums: Counter[str] = Counter()
    for key, process in after.items():
        earlier = before[key].cpu_s if key in before else 0.0
        sums[process.kind] += process.cpu_s - earlier  # type: ignore[assignment]
    return dict(sums)


def rss_bytes(now: Snapshot) -> dict[str, int]:
    """Return the resident memory by kind of process; pages that forks share count for each."""
    sums: Counter[str] = Counter()
    for process in now.values():
        sums[process.kind] += process.rss_bytes
    return dict(sums)


def end_what_is_left() -> list[str]:
    """Wait until this process has no descendants; kill those that do not end.

    Returns:
      Command lines of the processes that were killed.
    """
    deadline = time.monotonic() + GRACE_S
    killed = []
    while left := _descendants():
        if time.monotonic() > deadline:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    killed.append(" ".join(process.cmdline())[:120])
                    process.kill()
            deadline += GRACE_S
        time.sleep(0.05)
    return killed


def _descendants() -> list[psutil.Process]:
    """Return the running descendants, and reap adopted ones that have ended."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
            elif process.ppid() == os.getpid():
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return running
