"""Results that are kept to answer later tasks with equal inputs: how many, and forgetting them.

`tasks.state.sharing` says when a result is kept; `lua/kept_results.lua` has the keys.
"""

from __future__ import annotations

import redis

from inferno import names
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.transport.script import Script


class Cache:
    """What is kept, for operators."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where it is."""
        self._redis = client
        self._keys = names.cache_keys(settings.redis.prefix)
        self._clear = Script("tasks.state", "clear")

    def size(self) -> tuple[int, int]:
        """Return how many results are kept, and their bytes together.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            pipe.zcard(f"{self._keys}index")
            pipe.hget(f"{self._keys}sizes", "")
            entries, size = pipe.execute()
        return entries, int(size or 0)

    def clear(self, model: str | None = None) -> int:
        """Forget the kept results, of one model or of all; returns how many there were.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        beginning = "" if model is None else f"{model}/"
        with translated():
            return int(self._clear.run(self._redis, {"cache": self._keys, "beginning": beginning}))
