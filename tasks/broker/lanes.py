"""The lanes: Celery's queues, and what their broker can do beyond Celery.

On Redis Streams a message is published, settled and delayed in the same atomic step as the records
change: `Lanes.pack` gives such scripts the message. Other brokers take messages through Celery, in
a step of their own; what else they cannot do raises `NotSupported`.
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
from tasks.transport import Lane, pack, scripts
from tasks.transport.script import InlineScript

#: Brokers on which 0 is the most urgent priority, as Celery documents it.
_INVERTED = ("redis", "rediss", "sentinel")


#: How long RabbitMQ may take to confirm a message, in seconds. It stops to read when it is full.
CONFIRM_TIMEOUT_S = 10.0


class Message(msgspec.Struct, frozen=True):
    """A Celery task on its way into a queue."""

    queue: str
    name: str
    task_id: str
    kwargs: dict[str, Any]
    #: 0 to 9; higher is sooner, whatever the broker thinks.
    priority: int = 0
    #: Not to be handed out before.
    eta: datetime | None = None
    #: Not to be run after; seconds from now, or a time.
    expires: float | datetime | None = None
    retries: int = 0
    #: What Flower shows; the arguments themselves may be large or private.
    kwargsrepr: str = ""


class Held(msgspec.Struct, frozen=True):
    """A message in a worker's hands: its entry in a stream. Empty for other brokers."""

    stream: str = ""
    entry: str = ""

    @classmethod
    def of(cls, delivery_info: dict[str, Any]) -> Held:
        """Return what a delivered message says of itself."""
        return cls(delivery_info.get("stream", ""), delivery_info.get("entry", ""))


@dataclass(frozen=True)
class Waiting:
    """A message that is in nobody's hands."""

    task_id: str
    #: Its entry; empty while it is delayed.
    held: Held
    #: What it says, while it is delayed; else `Lanes.at` tells.
    message: bytes = b""
    #: The Redis command that takes it from among the delayed.
    removal: tuple[str | bytes, ...] = ()


@dataclass(frozen=True)
class Backlog:
    """How much is in a lane."""

    #: Waiting to be fetched.
    waiting: int
    #: In workers' hands.
    held: int
    #: To be handed out later.
    delayed: int

    @property
    def total(self) -> int:
        """Everything that is not settled."""
        return self.waiting + self.held + self.delayed


class Lanes:
    """The queues of one broker."""

    def __init__(self, app: Celery, client: redis.Redis, settings: Settings) -> None:
        """Store how to reach the broker.

        Args:
          app: publishes to brokers that are no streams.
          client: of the Redis that holds the streams, answering in bytes.
          settings: say which broker it is.
        """
        self._app = app
        self._redis = client
        #: Whether lanes are streams.
        self.streams = settings.broker.url is None
        self._inverted = settings.broker_url.partition("://")[0] in _INVERTED
        #: What a broker raises that is away; no Redis, when it is not one.
        self._lost = app.connection_for_write().recoverable_connection_errors
        #: Messages by the name of their task, as Celery makes them, for what they have in common.
        self._templates: dict[str, Any] = {}
        #: Queues that the broker knows of.
        self._declared: set[str] = set()
        self._size = InlineScript(_SIZES)

    def key(self, queue: str) -> str:
        """Return the key that scripts publish to, or "" when the queue is no stream."""
        return Lane.of(queue).key if self.streams else ""

    def pack(self, message: Message) -> bytes:
        """Return a message as scripts publish it, or b"" when the queue is no stream."""
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

    def enqueue(self, message: Message) -> dict[str, str | int | bytes]:
        """Return the command by which `tasks.state.transitions` publishes a message to a stream."""
        return {
            "kind": "enqueue",
            "lane": self.key(message.queue),
            "priority": message.priority,
            "message": self.pack(message),
        }

    def delay(self, message: Message, due: float) -> dict[str, str | int | bytes]:
        """Return the command that publishes a message at a time, in seconds since the epoch."""
        return {**self.enqueue(message), "kind": "delay", "due_ms": round(due * 1000)}

    def send(self, message: Message) -> None:
        """Publish a message by itself.

        Raises:
          BrokerUnavailable: the broker does not answer.
        """
        queue = self._app.amqp.queues[message.queue]
        headers, properties, body = self._parts(message)
        task = self._template(message.name)._replace(
            headers=headers, properties=properties, body=body
        )
        # `send_task` would route again, and subscribe to the result on a connection that all
        # threads share.
        try:
            with translated(), self._app.producer_or_acquire() as producer:
                self._app.amqp.send_task_message(
                    producer,
                    message.name,
                    task,
                    queue=queue,
                    # Once is enough, and costs a quarter of a publish.
                    declare=[] if queue.name in self._declared else [queue],
                    priority=self.to_broker(message.priority),
                    confirm_timeout=CONFIRM_TIMEOUT_S,
                )
        except self._lost as exc:
            # It may come back without them.
            self._declared.clear()
            raise BrokerUnavailable(
                f"the broker does not answer ({type(exc).__name__}); try again in a moment"
            ) from exc
        self._declared.add(queue.name)

    def _template(self, name: str) -> Any:
        """Return what Celery makes of a task; most of it is the same for each of a name."""
        template = self._templates.get(name)
        if template is None:
            template = self._templates[name] = self._app.amqp.as_task_v2("", name, argsrepr="")
        return template

    def _parts(self, message: Message) -> tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]:
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
        """Turn our priority, where higher is sooner, into the broker's."""
        return MAX_PRIORITY - priority if self._inverted else priority

    def from_broker(self, priority: int | None) -> int:
        """Turn the broker's priority, which any client may have chosen, into ours."""
        if priority is None:
            return 0
        within = min(max(int(priority), MIN_PRIORITY), MAX_PRIORITY)
        return MAX_PRIORITY - within if self._inverted else within

    def backlog(self, queue: str) -> Backlog:
        """Count what is in a lane.

        Raises:
          NotSupported: the lane is no stream.
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            counts = self._size.run(self._redis, [self._key(queue)])
        return Backlog(*counts)

    def leave(self, queue: str) -> int:
        """Give back what this process holds of a lane, for others to run first.

        For the end of a worker, when nothing runs any more. Other brokers do it by themselves, when
        the connection closes.

        Returns:
          how many messages were given back.
        Raises:
          BrokerUnavailable: Redis does not answer; others find out by themselves, a little later.
        """
        if not self.streams:
            return 0
        with translated():
            return Lane.of(queue).leave(self._redis)

    def give_back(self, queue: str, held: Iterable[Held]) -> int:
        """Give back some messages of this process, for others to run first.

        Returns:
          how many were given back: none, where the broker does so when the connection closes.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        if not self.streams:
            return 0
        with translated():
            return Lane.of(queue).give_back(self._redis, [(h.stream, h.entry) for h in held])

    def pause(self, queue: str) -> None:
        """Hand out nothing more of a lane; tasks are accepted, and those in workers' hands end.

        Raises:
          NotSupported: the lane is no stream.
          BrokerUnavailable: Redis does not answer.
        """
        self._key(queue)
        with translated():
            Lane.of(queue).pause(self._redis)

    def resume(self, queue: str) -> None:
        """Hand out a paused lane again.

        Raises:
          NotSupported: the lane is no stream.
          BrokerUnavailable: Redis does not answer.
        """
        self._key(queue)
        with translated():
            Lane.of(queue).resume(self._redis)

    def paused(self, queue: str) -> bool:
        """Return whether a lane is paused; only streams can be.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            return self.streams and bool(self._redis.exists(Lane.of(queue).paused))

    def waiting(self, queue: str) -> Iterator[Waiting]:
        """Yield what waits in a lane or for its time.

        Raises:
          NotSupported: the lane is no stream.
          BrokerUnavailable: Redis does not answer.
        """
        key = self._key(queue)
        yield from self._delayed(key, "-inf", "+inf")
        for name in scripts.STREAMS:
            yield from self._waiting(f"{key}:{name}")

    def postponed(self, queue: str, due: float) -> Iterator[Waiting]:
        """Yield what waits for that very time, in seconds since the epoch, where lanes are streams.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        if self.streams:
            at = round(due * 1000)
            yield from self._delayed(self.key(queue), at, at)

    def at(self, held: Held) -> bytes:
        """Return the message of an entry, or b"" when there is none.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        if not held.entry:
            return b""
        with translated():
            found: Any = self._redis.xrange(held.stream, held.entry, held.entry)
        return found[0][1][b"message"] if found else b""

    def _delayed(self, key: str, earliest: int | str, latest: int | str) -> Iterator[Waiting]:
        delayed = f"{key}:delayed"
        with translated():
            members = cast(list[bytes], self._redis.zrangebyscore(delayed, earliest, latest))
        for member in members:
            # The first byte is the priority.
            message = member[1:]
            if task_id := _task_id(message):
                yield Waiting(task_id, Held(), message, ("ZREM", delayed, member))

    def _waiting(self, stream: str) -> Iterator[Waiting]:
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
                    yield Waiting(task_id, Held(stream, entry.decode()))
            if not entries:
                return
            last = entries[-1][0]

    def _key(self, queue: str) -> str:
        if not self.streams:
            raise NotSupported(
                "this needs lanes on Redis Streams, which INFERNO_BROKER__URL has replaced"
            )
        return self.key(queue)


def _iso(when: float | datetime | None) -> str | None:
    """Return a time, or one that many seconds from now, as Celery writes it."""
    if when is None:
        return None
    if not isinstance(when, datetime):
        when = datetime.now(UTC) + timedelta(seconds=when)
    return when.isoformat()


def _task_id(message: bytes) -> str | None:
    try:
        return str(loads(message)["headers"]["id"])
    except (ValueError, LookupError, TypeError):
        return None  # Nothing of ours; the worker that is handed it puts it aside.


#: KEYS: lane. Returns how many messages wait, are held, and are delayed.
_SIZES = (
    scripts.LIBRARY
    + """
local lane = KEYS[1]
local total, held = 0, 0
for _, name in ipairs(STREAMS) do
  local stream = lane .. ':' .. name
  local length = redis.call('XLEN', stream)
  if length > 0 then
    total = total + length
    local pending = redis.pcall('XPENDING', stream, GROUP)
    held = held + (pending.err and 0 or pending[1])
  end
end
return {math.max(total - held, 0), held, redis.call('ZCARD', lane .. ':delayed')}
"""
)
