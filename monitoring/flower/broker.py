"""The lengths of lanes for Flower.

Flower only knows some brokers, by their URL's scheme. kombu knows every transport of Celery, and so
asks the lanes on Redis Streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import urlsplit

from flower.utils import broker
from kombu import Connection


class Broker(broker.Broker):  # type: ignore[misc]
    """Replaces Flower's own class."""

    #: Queues to show even if no worker reports them.
    lanes: Collection[str] = ()
    #: URL of the broker. Flower leaves out what follows a question mark, such as TLS certificates.
    url = ""

    def __new__(cls, broker_url: str, *args: Any, **kwargs: Any) -> Any:
        """Return a client for the scheme of a URL."""
        if "-streams" in urlsplit(broker_url).scheme:
            return Lanes(cls.url or broker_url, kwargs.get("broker_options") or {}, cls.lanes)
        return super().__new__(cls, broker_url, *args, **kwargs)


class Lanes:
    """Counts the messages in queues through kombu."""

    def __init__(self, url: str, options: dict[str, Any], lanes: Collection[str]) -> None:
        """Store the broker's address.

        Args:
          url: URL of the broker.
          options: options of the transport.
          lanes: queues to count even if no worker reports them.
        """
        self._url = url
        self._options = options
        self._lanes = lanes

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return the names and lengths of queues, in Flower's format."""
        counted = sorted({*names, *self._lanes})
        return await asyncio.get_running_loop().run_in_executor(None, self._count, counted)

    def _count(self, names: list[str]) -> list[dict[str, Any]]:
        with Connection(self._url, transport_options=self._options) as connection:
            return [{"name": name, "messages": _length(connection, name)} for name in names]


def _length(connection: Connection, name: str) -> int:
    try:
        return int(connection.default_channel.queue_declare(name, passive=True).message_count)
    except connection.channel_errors:
        return 0  # No process has used the queue yet.
