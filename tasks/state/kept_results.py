"""Kept results, which answer later tasks with equal inputs: counting and deleting them.

`tasks.state.sharing` decides when a result is kept, and describes the keys.
"""

from __future__ import annotations

import redis

from inferno import names
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.transport.script import Script


class Cache:
    """Counts and deletes the kept results."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where results are kept."""
        self._redis = client
        self._keys = names.cache_keys(settings.redis.prefix)
        self._clear = Script("tasks.state", "clear")

    def size(self) -> tuple[int, int]:
        """Return the number of kept results, and their total size in bytes.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            pipe.zcard(f"{self._keys}index")
            pipe.hget(f"{self._keys}sizes", "")
            entries, size = pipe.execute()
        return entries, int(size or 0)

    def clear(self, model: str | None = None) -> int:
        """Delete the kept results of one model, or of all, and return their number.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        beginning = "" if model is None else f"{model}/"
        with translated():
            return int(self._clear.run(self._redis, {"cache": self._keys, "beginning": beginning}))
