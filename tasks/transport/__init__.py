"""Queues on Redis Streams: a kombu transport that loses nothing when a worker dies.

Features
========
* Type: Virtual
* Supports Direct: Yes
* Supports Topic: Yes
* Supports Fanout: Yes
* Supports Priority: Yes, 0 to 9; higher is sooner, as on RabbitMQ
* Supports TTL: No
* Supports countdown and eta: Yes, in Redis; a worker holds only messages that are due

The stock Redis transport removes a message from its list before it writes it down as
unacknowledged. A worker that is killed in between loses the message, and a killed worker's other
messages come back only after ``visibility_timeout``. Here a message stays in its stream until it is
acknowledged, and the step that hands it out also records who holds it.

    publish   XADD to the stream of its priority, and ring the lane's bell
    wait      BRPOP on the bells: it wakes one consumer and takes no message
    fetch     XREADGROUP on all streams of the lane, for as many messages as there is credit
    ack       XACK and XDEL, so that the length of a queue is its exact backlog
    delay     a sorted set by due time; the lane's consumers move due messages into their streams

A lane is the set of keys of one queue (`lane.py`, `lua/lane.lua`). Each step except the wait is one
Lua script.

Each process is one consumer, with a name of its own that its connections bear too. It reports every
`heartbeat_interval`. When its reports stop, the other consumers look for its connections: Redis
closes those of a killed process at once, and keeps those of a process that is busy or paused. When
the connections are gone, or the consumer's lease is over, the others take over what it held: within
three seconds after a SIGKILL. A message is never handed out again because of its age, so a slow
task is not run twice.

Only ordinary queues are streams. Fanout and the queues of remote control and events stay as they
are in `kombu.transport.redis`, so that ``celery inspect``, ``celery events`` and Flower work.

Connection String
=================
.. code-block::

    redis-streams://[USER:PASSWORD@]REDIS_ADDRESS[:PORT][/VIRTUALHOST]
    rediss-streams://[USER:PASSWORD@]REDIS_ADDRESS[:PORT][/VIRTUALHOST]

kombu knows these schemes after `register`. Or set the class as the transport (Celery's setting
``broker_transport``): ``tasks.transport:Transport``.

Transport Options
=================
The options of `kombu.transport.redis`, except ``visibility_timeout``, ``ack_emulation``,
``priority_steps`` and the ``unacked_*`` options, which have no meaning for streams; and:

* ``heartbeat_interval``: (float) Seconds between two reports of a consumer. Defaults to 0.5.
* ``lease``: (float) Seconds of silence after which a consumer counts as dead even if it has
  connections: its host or network may be lost. It must be longer than any task that holds Python's
  global lock. Defaults to 900.
* ``grace``: (float) Seconds after a restart of Redis, or after our own reconnect, during which
  nobody counts as dead, because all consumers are reconnecting. Defaults to 5.

Needs Redis 6.2 or newer with ``maxmemory-policy noeviction``; does not run on Redis Cluster.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as lists

from tasks.transport import compression
from tasks.transport.channel import Channel
from tasks.transport.lane import StreamLane, consumer_name
from tasks.transport.message import Message, pack

__all__ = ("Channel", "Message", "StreamLane", "Transport", "consumer_name", "pack", "register")


class Poller(lists.MultiChannelPoller):  # type: ignore[misc]
    """Reads from all channels of a connection, and tends their lanes."""

    def tend(self) -> None:
        """Tend every channel's lanes."""
        for channel in list(self._channels):
            channel.tend()

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        """Wait for one event, for consumers without an event loop."""
        self.tend()
        return super().get(callback, timeout)


class Transport(lists.Transport):  # type: ignore[misc]
    """Redis Streams."""

    Channel = Channel

    implements = lists.Transport.implements.extend(batch_publish=False)
    supports_batch_publish = False
    driver_name = "redis-streams"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let an event loop read from the channels and tend their lanes."""
        super().register_with_event_loop(connection, loop)
        interval = connection.client.transport_options.get(
            "heartbeat_interval", Channel.heartbeat_interval
        )
        # After a reconnect the loop's timers are gone, or the old timer belongs to the old poller.
        loop.call_repeatedly(interval, self.cycle.tend)


def register() -> None:
    """Make the URL schemes known to kombu, and bound what it decompresses."""
    compression.bound()
    TRANSPORT_ALIASES["redis-streams"] = "tasks.transport:Transport"
    TRANSPORT_ALIASES["rediss-streams"] = "tasks.transport:Transport"
