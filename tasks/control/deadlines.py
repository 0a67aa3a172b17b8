"""The deadlines of tasks that somebody in this process waits for.

A worker that has a task in hands ends it when its deadline passes. While no worker has it, those
who wait for it see to that.
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

#: How long after a deadline a worker may still say so itself, in seconds.
LATE_S = 0.1


def is_late(record: Record) -> bool:
    """Return whether a task's deadline has passed, and no worker says so."""
    return record.overdue(time.time() - LATE_S)


class Deadlines:
    """One thread that ends late tasks; it starts with the first, and so after gunicorn's fork."""

    #: Pause before another try when Redis does not answer, in seconds.
    RETRY_S = 1.0
    #: Shortest pause between two looks, so that deadlines close together cost one, in seconds.
    TICK_S = 0.02
    #: So many are kept before those that nobody waits for any more are looked for.
    KEPT = 1000

    def __init__(self, bridge: Bridge, records: Records, control: Control) -> None:
        """Store who is asked.

        Args:
          bridge: knows who waits.
          records: say whether a task is late.
          control: ends it.
        """
        self._bridge = bridge
        self._records = records
        self._control = control
        self._changed = threading.Condition()
        #: When to look, in seconds since the epoch, and for which task; a heap.
        self._due: list[tuple[float, str]] = []
        self._most = self.KEPT
        self._thread: threading.Thread | None = None
        self._stopping = False

    def watch(self, task_id: str, deadline: float | None) -> None:
        """End a task after its deadline if somebody waits for it then, and no worker has it.

        Args:
          task_id: somebody waits for it already.
          deadline: seconds since the epoch; None for no deadline.
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
            wanted = [task_id for task_id in task_ids if self._bridge.awaits(task_id)]
            try:
                self._expire(wanted)
            except BrokerUnavailable:
                with self._changed:
                    for task_id in wanted:
                        self._push(time.time() + self.RETRY_S, task_id)
            except Exception:
                log.exception("The deadlines of %d tasks could not be enforced", len(wanted))

    def _next(self) -> list[str] | None:
        """Wait for deadlines and return whose have passed; None when stopping."""
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
                # It runs; if that attempt fails, nobody may be there for the next one.
                with self._changed:
                    self._push(time.time() + self.RETRY_S, record.task_id)
