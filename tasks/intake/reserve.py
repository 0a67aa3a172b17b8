"""Memory of Redis that new tasks may not take (step "submit").

A task that was accepted needs memory until it ends: for its record, its retries and its result. So
new tasks are refused before Redis is full. Redis itself refuses writes only when it is.
"""

from __future__ import annotations

import logging
import time
from typing import cast

import redis

from inferno.errors import BrokerUnavailable
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.state.kept_results import Cache

logger = logging.getLogger(__name__)


class Reserve:
    """Refuses new tasks when Redis has little memory left; one per process."""

    #: How long a reading of Redis' memory is used, in seconds.
    READING_S = 1.0
    #: Share of the room of a reading that new tasks may take before the next reading. Other
    #: processes take from the same room.
    SHARE_OF_READING = 1 / 8
    #: Least reserve, in bytes, unless that is more than half of the memory.
    LEAST_BYTES = 4_000_000
    #: Memory of a task beside its inputs, in bytes: its record, and its entries in indexes.
    TASK_BYTES = 2_000

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store whose memory is watched; nothing is read yet.

        Args:
          client: Redis that holds tasks and results.
          settings: the share of its memory that is kept free.
        """
        self._redis = client
        self._share = settings.redis.reserve
        self._kept_results = Cache(client, settings)
        #: Bytes that new tasks may take: those of the last reading, less what was taken since.
        self._room = float("inf")
        #: Room below which the memory is read again.
        self._stale_below = 0.0
        #: Time of the next reading; monotonic seconds.
        self._due_at = 0.0 if self._share else float("inf")
        self._percent_used = 0

    def take(self, size: int) -> None:
        """Claim room for a new task.

        Args:
          size: length of its message and its inputs, in bytes.
        Raises:
          BrokerUnavailable: Redis is nearly full, or does not answer.
        """
        needed = size + self.TASK_BYTES
        if self._room < self._stale_below or time.monotonic() >= self._due_at:
            self._read(needed)
        if self._room < needed:
            raise BrokerUnavailable(
                f"Redis is nearly full: {self._percent_used} % of its memory is in use; "
                "try again in a moment"
            )
        self._room -= needed

    def _read(self, needed: int) -> None:
        """Read the memory; delete the kept results if a task that needs this much has no room."""
        # Other threads go on with the last reading meanwhile.
        self._due_at, self._stale_below = time.monotonic() + self.READING_S, 0.0
        room = self._free()
        if room < needed and self._kept_results.clear():
            room = self._free()
        self._room, self._stale_below = room, room * (1 - self.SHARE_OF_READING)

    def _free(self) -> float:
        """Return how many bytes new tasks may take now; 0 if Redis is nearly full."""
        try:
            with translated():
                memory = cast(dict[str, int], self._redis.info("memory"))
        except redis.ResponseError as exc:
            # An access list from before this check, for example.
            logger.warning("new tasks are refused only when Redis is full: INFO failed: %s", exc)
            self._due_at = float("inf")
            return float("inf")
        most = memory["maxmemory"]
        if not most:
            return float("inf")
        # Redis does not count these buffers either.
        used = memory["used_memory"] - memory.get("mem_not_counted_for_evict", 0)
        self._percent_used = round(100 * used / most)
        reserve = min(max(self._share * most, self.LEAST_BYTES), most / 2)
        return max(most - reserve - used, 0.0)
