"""Lanes: the Redis keys of one queue, and the steps on them that need no channel."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

import redis

from tasks.transport.script import Script

#: Streams of a lane, in the order in which they are handed out; as in `lua/lane.lua`.
STREAMS = ("returned", *"9876543210")

_GIVE_BACK = Script("tasks.transport", "give_back")
_LEAVE = Script("tasks.transport", "leave")
_PAUSE = Script("tasks.transport", "pause")
_RESUME = Script("tasks.transport", "resume")

#: Process id and consumer name; a forked process needs a name of its own.
_process: tuple[int, str] = (0, "")


def consumer_name() -> str:
    """Return this process's name as a consumer; it stays the same until the process ends.

    Connections bear it as their client name, so that others see that the process is alive.
    """
    global _process
    if _process[0] != os.getpid():
        _process = os.getpid(), f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
    return _process[1]


@dataclass(frozen=True)
class StreamLane:
    """The keys of one queue on Redis Streams."""

    #: Prefix of its keys, without the colon. ``0`` to ``9`` and ``returned`` are streams,
    #: ``delayed`` is a sorted set, ``bell`` a list, ``consumers`` a hash, ``paused`` a string.
    key: str

    @classmethod
    def of(cls, queue: str, global_keyprefix: str = "") -> StreamLane:
        """Return the lane of a queue. No key has the queue's name: stock tools call LLEN on it."""
        return cls(f"{global_keyprefix}stream:{queue}")

    @property
    def streams(self) -> list[str]:
        """Keys of its streams, in the order in which they are handed out."""
        return [f"{self.key}:{name}" for name in STREAMS]

    @property
    def delayed(self) -> str:
        """Key of the messages that are not due yet, by due time in milliseconds."""
        return f"{self.key}:delayed"

    @property
    def bell(self) -> str:
        """Key of the list that wakes a waiting consumer."""
        return f"{self.key}:bell"

    def pause(self, client: redis.Redis) -> None:
        """Stop handing out messages; messages that are held can still be settled."""
        _PAUSE.run(client, {"lane": self.key})

    def resume(self, client: redis.Redis) -> None:
        """Hand out messages again."""
        _RESUME.run(client, {"lane": self.key})

    def is_paused(self, client: redis.Redis) -> bool:
        """Return whether the lane hands out nothing."""
        return bool(client.exists(f"{self.key}:paused"))

    def leave(self, client: redis.Redis) -> int:
        """Give back everything that this process holds, and remove it as a consumer.

        The messages are handed out before all others. A process calls this when it ends; without
        the call, other consumers find it dead a little later.

        Returns:
          how many messages were given back.
        """
        return int(_LEAVE.run(client, {"lane": self.key, "consumer": consumer_name()}))

    def give_back(self, client: redis.Redis, entries: Iterable[tuple[str, str]]) -> int:
        """Give back some messages of this process; they are handed out before all others.

        Args:
          client: of the lane's Redis.
          entries: stream and id of each message.
        Returns:
          how many messages this process still held.
        """
        fields = {"lane": self.key, "consumer": consumer_name(), "entries": list(entries)}
        return int(_GIVE_BACK.run(client, fields))
