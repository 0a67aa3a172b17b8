"""Quality of service: the messages that a channel has delivered and that are not settled yet."""

from __future__ import annotations

from typing import Any

import redis
from kombu.transport import redis as lists
from kombu.transport import virtual

from tasks.transport.message import entry_of
from tasks.transport.refusals import is_refusal


class QoS(lists.QoS):  # type: ignore[misc]
    """Counts the messages that a channel holds, and settles them.

    Messages of lists are treated as on the stock transport, which writes down each one. For
    streams, Redis knows who holds what.
    """

    def append(self, message: virtual.Message, delivery_tag: str) -> None:
        """Note a delivered message."""
        if entry_of(message) is None:
            super().append(message, delivery_tag)
        else:
            virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message and delete it."""
        entry = entry_of(self._delivered.get(delivery_tag))
        if entry is None:
            super().ack(delivery_tag)
        else:
            self.channel.release(*entry)
            self.forget(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Delete a message, or put it at the end of its queue."""
        message = self._delivered.get(delivery_tag)
        entry = entry_of(message)
        if entry is None:
            super().reject(delivery_tag, requeue)
            return
        if requeue:
            self.channel.requeue(message)
        else:
            self.channel.release(*entry)
        self.forget(delivery_tag)

    def forget(self, delivery_tag: str) -> None:
        """Free the credit of a message that a script has settled, or that others have now."""
        self._quick_ack(delivery_tag)

    def holds(self, delivery_tag: str) -> bool:
        """Return whether the channel holds a message."""
        return delivery_tag in self._delivered and delivery_tag not in self._dirty

    def held(self, queue: str) -> int:
        """Return how many messages of a queue the channel holds."""
        self._flush()
        return sum(
            message.delivery_info.get("queue") == queue for message in self._delivered.values()
        )

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Restore messages of lists whose consumers are gone; streams do not need this."""
        if self.channel.consumes_lists:
            try:
                super().restore_visible(*args, **kwargs)
            except redis.ResponseError as exc:
                if not is_refusal(exc):
                    raise

    def restore_unacked(self, client: Any = None) -> None:
        """Put every unacknowledged message at the end of its queue."""
        self._flush()
        for tag, message in list(self._delivered.items()):
            if entry_of(message) is not None:
                self.channel.requeue(message)
                del self._delivered[tag]
        super().restore_unacked(client)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Restore messages of lists when the channel closes.

        This process keeps its messages of streams: it may be working on them, and its next channel
        finds them again. Other consumers take them over when the process ends.
        """
        for tag, message in list(self._delivered.items()):
            if entry_of(message) is not None:
                del self._delivered[tag]
        super().restore_unacked_once(stderr)
