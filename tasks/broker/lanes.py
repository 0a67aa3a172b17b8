"""Lanes: Celery's queues, and what their broker can do beyond Celery.

On Redis Streams a script publishes, settles or delays a message in the same atomic step in which it
changes the task's record; `Lanes.pack` returns the message for such scripts. Other brokers get
messages through Celery, in a step of their own. What they cannot do raises `NotSupported`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import orjson
import redis
from celery import Celery
from kombu.utils.json import loads

from inferno.errors import BrokerUnavailable, NotSupported
from inferno.protocol.requests import MAX_PRIORITY, MIN_PRIORITY
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.transport import StreamLane, pack
from tasks.transport.script import Script

#: URL schemes of the brokers on which 0 is the most urgent priority, as Celery documents it.
_INVERTED = ("redis", "rediss", "sentinel")

#: How long RabbitMQ may take to confirm a message, in seconds. A full RabbitMQ stops reading.
CONFIRM_TIMEOUT_S = 10.0

_BACKLOG = Script("tasks.broker", "backlog")


class TaskMessage(msgspec.Struct, frozen=True):
    """The message of one Celery task, before it is published."""

    queue: str
    name: str
    task_id: str
    kwargs: dict[str, Any]
    #: 0 to 9; higher is sooner, on every broker.
    priority: int = 0
    #: Earliest time at which a worker may get the message.
    eta: datetime | None = None
    #: When the task expires: a time, or seconds from now.
    expires: float | datetime | None = None
    retries: int = 0
    #: Arguments as Flower shows them; the real ones may be large or private.
    kwargsrepr: str = ""


class Held(msgspec.Struct, frozen=True):
    """Where a message is in its lane: a stream and an entry id. Empty on other brokers."""

    stream: str = ""
    entry: str = ""

    @classmethod
    def of(cls, delivery_info: dict[str, Any]) -> Held:
        """Return the entry from which a message was delivered."""
        return cls(delivery_info.get("stream", ""), delivery_info.get("entry", ""))


@dataclass(frozen=True)
class WaitingMessage:
    """A message that no worker holds."""

    task_id: str
    #: Its stream entry; empty while it is delayed.
    entry: Held
    #: Its payload while it is delayed; `Lanes.at` reads the payload of an entry.
    message: bytes = b""
    #: The Redis command that removes it from the delayed messages.
    removal: tuple[str | bytes, ...] = ()


@dataclass(frozen=True)
class Backlog:
    """How many messages a lane has."""

    #: Not fetched yet.
    waiting: int
    #: Held by workers.
    held: int
    #: Not due yet.
    delayed: int

    @property
    def total(self) -> int:
        """All messages that are not settled."""
        return self.waiting + self.held + self.delayed


class Lanes:
    """The lanes of one broker."""

    def __init__(self, app: Celery, client: redis.Redis, settings: Settings) -> None:
        """Store how to reach the broker.

        Args:
          app: publishes to brokers other than Redis Streams.
          client: of the Redis that has the streams; it answers in bytes.
          settings: name the broker.
        """
        self._app = app
        self._redis = client
        #: Whether lanes are streams.
        self.streams = settings.broker.url is None
        self._inverted = settings.broker_url.partition("://")[0] in _INVERTED
        #: Errors of an unreachable broker; Redis' errors are among them only if it is Redis.
        self._lost = app.connection_for_write().recoverable_connection_errors
        #: One message of each task name as Celery builds it; all of one name share most fields.
        self._templates: dict[str, Any] = {}
        #: Queues that are declared on the broker.
        self._declared: set[str] = set()

    def key(self, queue: str) -> str:
        """Return the key prefix that scripts publish to, or "" when lanes are not streams."""
        return StreamLane.of(queue).key if self.streams else ""

    def pack(self, message: TaskMessage) -> bytes:
        """Return a message as scripts publish it, or b"" when lanes are not streams."""
        if not self.streams:
            return b""
        headers, properties, body = self._parts(message)
        return pack(
            orjson.dumps(body).decode(),
            message.queue,
            headers=headers,
            properties=properties,
            priority=message.priority,
        )

    def enqueue(self, message: TaskMessage) -> dict[str, str | int | bytes]:
        """Return the command by which `tasks.state.transitions` publishes a message to a stream."""
        return {
            "kind": "enqueue",
            "lane": self.key(message.queue),
            "priority": message.priority,
            "message": self.pack(message),
        }

    def delay(self, message: TaskMessage, due: float) -> dict[str, str | int | bytes]:
        """Return the command that publishes a message at a time, in seconds since the epoch."""
        return {**self.enqueue(message), "kind": "delay", "due_ms": round(due * 1000)}

    def send(self, message: TaskMessage) -> None:
        """Publish a message through Celery.

        Raises:
          BrokerUnavailable: the broker does not answer.
        """
        queue = self._app.amqp.queues[message.queue]
        headers, properties, body = self._parts(message)
        task = self._template(message.name)._replace(
            headers=headers, properties=properties, body=body
        )
        # `send_task` would route the task again, and subscribe to its result on a connection that
        # all threads share.
        try:
            with translated(), self._app.producer_or_acquire() as producer:
                self._app.amqp.send_task_message(
                    producer,
                    message.name,
                    task,
                    queue=queue,
                    # A declaration costs a quarter of a publish, so each queue gets one.
                    declare=[] if queue.name in self._declared else [queue],
                    priority=self.to_broker(message.priority),
                    confirm_timeout=CONFIRM_TIMEOUT_S,
                )
        except self._lost as exc:
            # The broker may come back without its queues.
            self._declared.clear()
            raise BrokerUnavailable(
                f"the broker does not answer ({type(exc).__name__}); try again in a moment"
            ) from exc
        self._declared.add(queue.name)

    def _template(self, name: str) -> Any:
        """Return a message of a task name as Celery builds it, without id and arguments."""
        template = self._templates.get(name)
        if template is None:
            template = self._templates[name] = self._app.amqp.as_task_v2("", name, argsrepr="")
        return template

    def _parts(
        self, message: TaskMessage
    ) -> tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]:
        """Return the headers, properties and body that Celery would give a message."""
        template = self._template(message.name)
        args, _, embedded = template.body
        task_id = message.task_id
        headers = template.headers | {
            "id": task_id,
            "root_id": task_id,
            "eta": _iso(message.eta),
            "expires": _iso(message.expires),
            "retries": message.retries,
            "kwargsrepr": message.kwargsrepr,
        }
        properties = template.properties | {"correlation_id": task_id}
        return headers, properties, (args, message.kwargs, embedded)

    def to_broker(self, priority: int) -> int:
        """Return the broker's priority for ours, where higher is sooner."""
        return MAX_PRIORITY - priority if self._inverted else priority

    def from_broker(self, priority: int | None) -> int:
        """Return our priority for the broker's, which any client may have set to anything."""
        if priority is None:
            return 0
        within = min(max(int(priority), MIN_PRIORITY), MAX_PRIORITY)
        return MAX_PRIORITY - within if self._inverted else within

    def backlog(self, queue: str) -> Backlog:
        """Count the messages of a lane.

        Raises:
          NotSupported: lanes are not streams.
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            counts = _BACKLOG.run(self._redis, {"lane": self._lane(queue).key})
        return Backlog(*counts)

    def leave(self, queue: str) -> int:
        """Give back everything that this process holds of a lane, for others to run first.

        A worker calls this when it ends and runs nothing any more. Other brokers give messages back
        when the connection closes.

        Returns:
          how many messages were given back.
        Raises:
          BrokerUnavailable: Redis does not answer; others take the messages over a little later.
        """
        if not self.streams:
            return 0
        with translated():
            return StreamLane.of(queue).leave(self._redis)

    def give_back(self, queue: str, held: Iterable[Held]) -> int:
        """Give back some messages of this process, for others to run first.

        Returns:
          how many were given back; 0 where the broker does so when the connection closes.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        if not self.streams:
            return 0
        with translated():
            return StreamLane.of(queue).give_back(self._redis, [(h.stream, h.entry) for h in held])

    def pause(self, queue: str) -> None:
        """Stop handing out a lane. Tasks are still accepted, and workers finish what they hold.

        Raises:
          NotSupported: lanes are not streams.
          BrokerUnavailable: Redis does not answer.
        """
        lane = self._lane(queue)
        with translated():
            lane.pause(self._redis)

    def resume(self, queue: str) -> None:
        """Hand out a paused lane again.

        Raises:
          NotSupported: lanes are not streams.
          BrokerUnavailable: Redis does not answer.
        """
        lane = self._lane(queue)
        with translated():
            lane.resume(self._redis)

    def paused(self, queue: str) -> bool:
        """Return whether a lane is paused; only streams can be.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            return self.streams and StreamLane.of(queue).is_paused(self._redis)

    def waiting(self, queue: str) -> Iterator[WaitingMessage]:
        """Yield the messages of a lane that no worker holds, delayed ones first.

        Raises:
          NotSupported: lanes are not streams.
          BrokerUnavailable: Redis does not answer.
        """
        lane = self._lane(queue)
        yield from self._delayed(lane, "-inf", "+inf")
        for stream in lane.streams:
            yield from self._waiting(stream)

    def postponed(self, queue: str, due: float) -> Iterator[WaitingMessage]:
        """Yield the messages of a lane that are delayed until exactly this time.

        Other brokers' lanes yield nothing.

        Args:
          queue: name of the lane.
          due: seconds since the epoch.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        if self.streams:
            at = round(due * 1000)
            yield from self._delayed(StreamLane.of(queue), at, at)

    def at(self, held: Held) -> bytes:
        """Return the payload of an entry, or b"" when the entry is empty or gone.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        if not held.entry:
            return b""
        with translated():
            found: Any = self._redis.xrange(held.stream, held.entry, held.entry)
        return found[0][1][b"message"] if found else b""

    def _delayed(
        self, lane: StreamLane, earliest: int | str, latest: int | str
    ) -> Iterator[WaitingMessage]:
        delayed = lane.delayed
        with translated():
            members = cast(list[bytes], self._redis.zrangebyscore(delayed, earliest, latest))
        for member in members:
            # The first byte is the priority.
            message = member[1:]
            if task_id := _task_id(message):
                yield WaitingMessage(task_id, Held(), message, ("ZREM", delayed, member))

    def _waiting(self, stream: str) -> Iterator[WaitingMessage]:
        with translated():
            if not self._redis.exists(stream):
                return
            groups = self._redis.xinfo_groups(stream)
        last = b"0-0" if not groups else groups[0]["last-delivered-id"]
        while True:
            with translated():
                entries = cast(
                    list[tuple[bytes, dict[bytes, bytes]]],
                    self._redis.xrange(stream, min=b"(" + last, count=100),
                )
            for entry, fields in entries:
                if task_id := _task_id(fields[b"message"]):
                    yield WaitingMessage(task_id, Held(stream, entry.decode()))
            if not entries:
                return
            last = entries[-1][0]

    def _lane(self, queue: str) -> StreamLane:
        if not self.streams:
            raise NotSupported(
                "this needs lanes on Redis Streams, but INFERNO_BROKER__URL names another broker"
            )
        return StreamLane.of(queue)


def _iso(when: float | datetime | None) -> str | None:
    """Return a time as Celery writes it; a number means seconds from now."""
    if when is None:
        return None
    if not isinstance(when, datetime):
        when = datetime.now(UTC) + timedelta(seconds=when)
    return when.isoformat()


def _task_id(message: bytes) -> str | None:
    try:
        return str(loads(message)["headers"]["id"])
    except (ValueError, LookupError, TypeError):
        return None  # Not a task message: the worker that fetches it puts it aside.
