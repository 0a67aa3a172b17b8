"""The lengths of lanes for Flower, which asks only the brokers that it knows by their scheme.

Others are asked through kombu, which knows every transport that Celery can use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import urlsplit

from flower.utils import broker
from kombu import Connection


class Broker(broker.Broker):  # type: ignore[misc]
    """Takes the place of Flower's own."""

    #: Queues to show besides those that workers have told of: their workers may all be gone.
    lanes: Collection[str] = ()

    def __new__(cls, broker_url: str, *args: Any, **kwargs: Any) -> Any:
        """Return a client for the scheme of a URL."""
        if urlsplit(broker_url).scheme.endswith("-streams"):
            return Lanes(broker_url, kwargs.get("broker_options") or {}, cls.lanes)
        return super().__new__(cls, broker_url, *args, **kwargs)


class Lanes:
    """Counts what is in queues by the means of their transport."""

    def __init__(self, url: str, options: dict[str, Any], lanes: Collection[str]) -> None:
        """Store where they are.

        Args:
          url: of the broker.
          options: of the transport.
          lanes: queues that are counted in any case.
        """
        self._url = url
        self._options = options
        self._lanes = lanes

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return names and lengths of queues, in Flower's form."""
        wanted = sorted({*names, *self._lanes})
        return await asyncio.get_running_loop().run_in_executor(None, self._count, wanted)

    def _count(self, names: list[str]) -> list[dict[str, Any]]:
        with Connection(self._url, transport_options=self._options) as connection:
            return [{"name": name, "messages": _length(connection, name)} for name in names]


def _length(connection: Connection, name: str) -> int:
    try:
        return int(connection.default_channel.queue_declare(name, passive=True).message_count)
    except connection.channel_errors:
        return 0  # Nobody has used it yet.
