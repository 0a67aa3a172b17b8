"""Enforces the deadlines of tasks that a caller in this process waits for.

A worker that holds a task ends it when its deadline passes. While no worker holds it, the processes
whose callers wait for it do so, each on one thread of its own.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time

from inferno.errors import BrokerUnavailable
from tasks.control.tasks import Control
from tasks.results.bridge import Bridge
from tasks.state.records import Record, Records

log = logging.getLogger(__name__)

#: Time after a deadline that a worker has to end the task itself, in seconds.
LATE_S = 0.1


def is_late(record: Record) -> bool:
    """Return whether a task's deadline has passed and no worker has ended it."""
    return record.overdue(time.time() - LATE_S)


class Deadlines:
    """Ends late tasks on one thread; it starts with the first task, after gunicorn has forked."""

    #: Pause before another try when Redis does not answer, in seconds.
    RETRY_S = 1.0
    #: Shortest pause between two checks, in seconds: deadlines close together cost one check.
    TICK_S = 0.02
    #: Number of watched tasks at which those that nobody awaits any more are dropped.
    KEPT = 1000

    def __init__(self, bridge: Bridge, records: Records, control: Control) -> None:
        """Store how to find late tasks and end them.

        Args:
          bridge: knows which tasks are awaited.
          records: the states and deadlines of tasks.
          control: ends late tasks.
        """
        self._bridge = bridge
        self._records = records
        self._control = control
        self._changed = threading.Condition()
        #: Heap of (time of the check in seconds since the epoch, task id).
        self._due: list[tuple[float, str]] = []
        self._most = self.KEPT
        self._thread: threading.Thread | None = None
        self._stopping = False

    def watch(self, task_id: str, deadline: float | None) -> None:
        """End a task after its deadline if it is still awaited then and no worker holds it.

        Args:
          task_id: a task that a caller already waits for.
          deadline: deadline in seconds since the epoch; None for no deadline.
        """
        if deadline is None:
            return
        with self._changed:
            self._push(deadline + LATE_S, task_id)
            if len(self._due) > self._most:
                self._due = [item for item in self._due if self._bridge.awaits(item[1])]
                heapq.heapify(self._due)
                self._most = 2 * len(self._due) + self.KEPT
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _push(self, due: float, task_id: str) -> None:
        heapq.heappush(self._due, (due, task_id))
        if self._due[0][1] == task_id:
            self._changed.notify()

    def _run(self) -> None:
        while (task_ids := self._next()) is not None:
            awaited = [task_id for task_id in task_ids if self._bridge.awaits(task_id)]
            try:
                self._expire(awaited)
            except BrokerUnavailable:
                with self._changed:
                    for task_id in awaited:
                        self._push(time.time() + self.RETRY_S, task_id)
            except Exception:
                log.exception("The deadlines of %d tasks could not be enforced", len(awaited))

    def _next(self) -> list[str] | None:
        """Wait until deadlines have passed and return their tasks; None when stopping."""
        with self._changed:
            while not self._stopping:
                now = time.time()
                task_ids = []
                while self._due and self._due[0][0] <= now:
                    task_ids.append(heapq.heappop(self._due)[1])
                if task_ids:
                    return task_ids
                self._changed.wait(max(self._due[0][0] - now, self.TICK_S) if self._due else None)
            return None

    def _expire(self, task_ids: list[str]) -> None:
        if not task_ids:
            return
        for record in self._records.records(task_ids):
            if record is not None and is_late(record):
                self._control.expire(record)
            elif record is not None and not record.state.terminal:
                # The task runs. If this attempt fails, no worker may be there for the next one.
                with self._changed:
                    self._push(time.time() + self.RETRY_S, record.task_id)
