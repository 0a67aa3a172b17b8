"""Ends the worker process when a forward pass takes longer than its model allows.

A thread cannot be killed: a pass that hangs would keep its executor and its tasks for ever. So the
whole process ends, its supervisor starts a new one, and the tasks are delivered again.

    watchdog thread   looks for passes over their limit; names them, dumps all stacks, exits
    faulthandler      the same without names, from a thread that needs no interpreter lock (GIL):
                      while a pass holds the lock, no Python code can run
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, Thread

from inferno.settings import variable

logger = logging.getLogger(__name__)

#: Interval at which the thread looks for passes over their limit, in seconds.
TICK_S = 1.0


@dataclass(frozen=True, eq=False)
class _Pass:
    what: str
    limit_s: float
    #: Monotonic seconds.
    deadline: float


class Watchdog:
    """Watches the forward passes of all threads; a process can have only one watchdog."""

    def __init__(self, *, grace_s: float = 5.0) -> None:
        """Store the limits.

        Args:
          grace_s: time for the thread to report a pass over its limit; more than `TICK_S`.
            faulthandler ends the process between `grace_s` and `2 * grace_s` after the limit.
        """
        self._grace_s = grace_s
        self._passes: set[_Pass] = set()
        self._lock = Lock()
        #: Monotonic time at which faulthandler ends the process; 0 if its timer is not set.
        self._ends_at = 0.0
        self._thread = Thread(target=self._run, name="watchdog", daemon=True)
        # Celery replaces sys.stderr with a logger, and faulthandler needs a file.
        self._stderr = sys.__stderr__ or open(os.devnull, "w")  # noqa: SIM115

    def start(self) -> None:
        """Begin to watch, until the process ends: passes may hang while it drains, too."""
        self._thread.start()

    @contextmanager
    def watch(self, what: str, limit_s: float) -> Iterator[None]:
        """End the process unless the body finishes in time; call `start` once before.

        Args:
          what: name of the pass, for the log.
          limit_s: longest time that the body may take, in seconds.
        """
        watched = _Pass(what, limit_s, time.monotonic() + limit_s)
        with self._lock:
            self._passes.add(watched)
            # Set here, because the watchdog's thread may never run again once the body has begun.
            # The timer is set well past the deadline, so that a busy worker sets it every few
            # seconds and not for every pass. It is never moved to an earlier time.
            if self._ends_at < watched.deadline + self._grace_s:
                self._end_in(limit_s + 2 * self._grace_s)
        try:
            yield
        finally:
            with self._lock:
                self._passes.discard(watched)

    def _end_in(self, delay_s: float) -> None:
        faulthandler.dump_traceback_later(delay_s, exit=True, file=self._stderr)
        self._ends_at = time.monotonic() + delay_s

    def _run(self) -> None:
        while True:
            time.sleep(TICK_S)
            with self._lock:
                now = time.monotonic()
                late = [watched for watched in self._passes if watched.deadline <= now]
                if late:
                    # In case the report blocks, too: a pass may hang because the log is blocked.
                    self._end_in(self._grace_s)
                    self._ends_at = math.inf
                elif not self._passes and self._ends_at:
                    faulthandler.cancel_dump_traceback_later()
                    self._ends_at = 0.0
            if late:
                self._end(late)

    def _end(self, late: list[_Pass]) -> None:
        try:
            for watched in late:
                logger.error(
                    "%s has not ended within its limit of %g s: this process ends with status %d, "
                    "and its tasks are delivered again; if the model needs longer, raise timeout_s "
                    "in its model.yaml or %s",
                    watched.what,
                    watched.limit_s,
                    os.EX_SOFTWARE,
                    variable("inference", "timeout_s"),
                )
            faulthandler.dump_traceback(file=self._stderr)
        finally:
            os._exit(os.EX_SOFTWARE)
