"""The channel: it publishes, fetches and settles messages, and takes over from dead consumers.

A consumer's event loop drives it: `_brpop_start` waits for a bell, `_brpop_read` fetches messages
and delivers them, and `tend` runs the heartbeats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from time import monotonic
from typing import Any

import redis
from kombu.exceptions import OperationalError
from kombu.log import get_logger
from kombu.transport import redis as lists
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str, str_to_bytes
from kombu.utils.json import dumps
from redis.backoff import NoBackoff
from redis.retry import Retry

from tasks.transport.lane import StreamLane, consumer_name
from tasks.transport.liveness import Liveness
from tasks.transport.message import Message, checked, due_ms, unpack
from tasks.transport.qos import QoS
from tasks.transport.refusals import is_refusal
from tasks.transport.script import Script

logger = get_logger(__name__)

#: Queues that are lists, as on the stock transport: remote control, events and replies (UUIDs).
LISTS = re.compile(r".*\.pidbox|celeryev\..*|[0-9a-f]{8}-[0-9a-f-]{27}")

#: How long messages of such a queue are kept, in seconds.
LISTS_TTL_S = 3600

#: Maximum messages of one fetch when there is no prefetch count.
UNLIMITED_FETCH = 100

#: Pause before another BRPOP on a Redis that refuses writes, in seconds.
REFUSED_PAUSE_S = 0.5

#: Messages that nobody can read: how many are kept of a queue, and how many bytes of each.
UNREADABLE_KEPT, UNREADABLE_BYTES = 1000, 65_536

#: Errors that have nothing to do with the message that was read. kombu's own list has KeyError.
_CONNECTION_LOST = (OSError, redis.RedisError, OperationalError)

#: Takes the new messages of one fetch; returns those that go to the queue's consumer.
Taker = Callable[[list[virtual.Message]], list[virtual.Message]]

_PUBLISH = Script("tasks.transport", "publish")
_FETCH = Script("tasks.transport", "fetch")
_HELD = Script("tasks.transport", "held")
_TEND = Script("tasks.transport", "tend")
_CLAIM = Script("tasks.transport", "claim")
_RELEASE = Script("tasks.transport", "release")
_REQUEUE = Script("tasks.transport", "requeue")
_SIZE = Script("tasks.transport", "size")
_PURGE = Script("tasks.transport", "purge")
_DELETE = Script("tasks.transport", "delete")


class Channel(lists.Channel):  # type: ignore[misc]
    """A channel whose ordinary queues are streams."""

    QoS = QoS
    Message = Message

    heartbeat_interval = 0.5
    lease = 900.0
    grace = 5.0

    from_transport_options = (
        *lists.Channel.from_transport_options,
        "heartbeat_interval",
        "lease",
        "grace",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client: Any = None
        self._commands: redis.Redis | None = None
        #: Subscribers that received the last message of each fanout exchange.
        self.audience: dict[str, int] = {}
        #: Queues of which this channel has delivered what the process already held.
        self._opened: set[str] = set()
        #: By queue. A taker gets the new messages of a fetch together, before kombu handles each.
        self.takers: dict[str, Taker] = {}
        #: Monotonic time at which Redis last refused a BRPOP, in seconds.
        self._refused_at = float("-inf")
        super().__init__(*args, **kwargs)
        # The transport options are set by now.
        self._liveness = Liveness(self.heartbeat_interval, self.grace)

    # Connections

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        # A retry could write twice, and would notice a dead Redis late.
        params: dict[str, Any] = super()._connparams(asynchronous)
        return params | {"client_name": consumer_name(), "retry": Retry(NoBackoff(), 0)}

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """Yield a client, the same each time: making one takes as long as a command."""
        if client is None and self._client is None:
            self._client = self._create_client()
        yield client or self._client

    @property
    def commands(self) -> redis.Redis:
        """A client that adds no prefix to keys."""
        if self._commands is None:
            self._commands = redis.Redis(connection_pool=self.pool)
        return self._commands

    def _disconnect_pools(self) -> None:
        self._client = self._commands = None
        super()._disconnect_pools()

    def _run(self, script: Script, **fields: Any) -> Any:
        return script.run(self.commands, fields)

    # Queues

    def _lane(self, queue: str) -> StreamLane | None:
        """Return the lane of a queue, or None when the queue is a list."""
        if LISTS.fullmatch(queue):
            return None
        return StreamLane.of(queue, self.global_keyprefix)

    @property
    def _lanes(self) -> dict[str, StreamLane]:
        """The lanes that this channel consumes, by queue."""
        lanes = {queue: self._lane(queue) for queue in self.active_queues}
        return {queue: lane for queue, lane in lanes.items() if lane is not None}

    @property
    def consumes_lists(self) -> bool:
        """Whether this channel consumes lists, too."""
        return len(self._lanes) < len(self.active_queues)

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        lane = self._lane(queue)
        if lane is None:
            super()._put(queue, message, **kwargs)
            # A monitor that was killed never fetches its answers.
            key = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
            self.commands.expire(f"{self.global_keyprefix}{key}", LISTS_TTL_S)
            return
        self._run(
            _PUBLISH,
            lane=lane.key,
            priority=self._get_message_priority(message),
            due_ms=due_ms(message),
            payload=dumps(message),
        )

    def _put_fanout(
        self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any
    ) -> None:
        with self.conn_or_acquire() as client:
            topic = self._get_publish_topic(exchange, routing_key)
            self.audience[exchange] = client.publish(topic, dumps(message))

    def _get(self, queue: str) -> dict[str, Any]:
        lane = self._lane(queue)
        if lane is None:
            return super()._get(queue)  # type: ignore[no-any-return]
        for entry in self._take(lane, 1):
            if (message := self._read(queue, lane, entry)) is not None:
                return message
        raise Empty

    def _size(self, queue: str) -> int:
        lane = self._lane(queue)
        return int(super()._size(queue) if lane is None else self._run(_SIZE, lane=lane.key))

    def _purge(self, queue: str) -> int:
        lane = self._lane(queue)
        return int(super()._purge(queue) if lane is None else self._run(_PURGE, lane=lane.key))

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any
    ) -> None:
        """Delete a queue with everything in it."""
        lane = self._lane(queue)
        if lane is not None and not (if_empty and self._size(queue)):
            self._run(_DELETE, lane=lane.key)
        super().queue_delete(queue, if_unused, if_empty, **kwargs)

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        lane = self._lane(queue)
        if lane is None:
            return bool(super()._has_queue(queue, **kwargs))
        # A stream exists while it has messages; the consumers' hash while somebody consumes.
        return bool(self._size(queue) or self.commands.exists(f"{lane.key}:consumers"))

    # Fetching

    def fetch(self) -> bool:
        """Deliver waiting messages as far as there is credit; returns whether there were any."""
        return self._fetch(self._lanes)

    @property
    def _lease_ms(self) -> int:
        return round(self.lease * 1000)

    def _credit(self, queue: str) -> int:
        """Return how many messages of a queue may be fetched.

        Queues share the prefetch count evenly, so that a long queue leaves room for the others.
        """
        credit = self.qos.can_consume_max_estimate()
        if credit is None:
            return UNLIMITED_FETCH
        count = len(self._lanes)
        if count > 1:
            share = -(-self.qos.prefetch_count // count)
            credit = min(credit, max(share - self.qos.held(queue), 0))
        return int(credit)

    def _fetch(self, lanes: dict[str, StreamLane]) -> bool:
        found = False
        for queue, lane in lanes.items():
            if limit := self._credit(queue):
                found |= self._hand_out(queue, lane, self._take(lane, limit))
        return found

    def _take(self, lane: StreamLane, limit: int) -> list[Any]:
        return self._careful(
            _FETCH, lane=lane.key, consumer=consumer_name(), lease_ms=self._lease_ms, limit=limit
        )

    def _careful(self, script: Script, **fields: Any) -> list[Any]:
        """Run a script that hands messages to this process.

        When its answer is lost, the process holds messages that it does not know of; the next wait
        looks for them. While Redis refuses writes there are no messages.
        """
        try:
            entries: list[Any] = self._run(script, **fields)
        except self.connection_errors:
            self._opened.clear()
            raise
        except redis.ResponseError as exc:
            if not is_refusal(exc):
                raise
            logger.warning("Redis refuses writes and hands out nothing for now: %s", exc)
            return []
        return entries

    def _open(self, queue: str, lane: StreamLane) -> None:
        """Begin to consume: first messages that this process already holds, then waiting ones."""
        self._opened.add(queue)
        held = self._run(_HELD, lane=lane.key, consumer=consumer_name())
        self._hand_out(queue, lane, held, redelivered=True)
        self._fetch({queue: lane})

    def _hand_out(
        self, queue: str, lane: StreamLane, entries: list[Any], redelivered: bool = False
    ) -> bool:
        """Deliver entries that this process now holds; returns whether there were any."""
        qos, taker = self.qos, None if redelivered else self.takers.get(queue)
        taken: list[virtual.Message] = []
        for entry in entries:
            message = self._read(queue, lane, entry)
            if message is None or qos.holds(message["properties"]["delivery_tag"]):
                continue
            if redelivered:
                message["properties"]["delivery_info"]["redelivered"] = True
            with self._aside(lane, entry):
                if taker is None:
                    self.connection._deliver(message, queue)
                else:
                    taken.append(self.Message(message, channel=self))
                    virtual.QoS.append(qos, taken[-1], taken[-1].delivery_tag)
        for left in taker(taken) if taker is not None and taken else ():
            info = left.delivery_info
            entry = [info["stream"], info["entry"], dumps(left._raw).encode()]
            with self._aside(lane, entry):
                self.connection._deliver(left._raw, queue)
        return bool(entries)

    def _read(self, queue: str, lane: StreamLane, entry: list[bytes]) -> dict[str, Any] | None:
        with self._aside(lane, entry):
            return unpack(entry[2], queue, bytes_to_str(entry[0]), bytes_to_str(entry[1]))
        return None

    @contextmanager
    def _aside(self, lane: StreamLane, entry: list[Any]) -> Iterator[None]:
        """Put a message aside whose reading or delivery raises an error.

        In its stream it would be delivered again for ever, and end one consumer after the other.
        """
        try:
            yield
        except _CONNECTION_LOST:
            raise
        except Exception:
            unreadable = f"{lane.key}:unreadable"
            logger.exception("A message of %s cannot be read; see %s", lane.key, unreadable)
            self.commands.xadd(
                unreadable, {"message": entry[2][:UNREADABLE_BYTES]}, maxlen=UNREADABLE_KEPT
            )
            self.release(bytes_to_str(entry[0]), bytes_to_str(entry[1]))

    # Settling

    def release(self, stream: str, entry: str) -> None:
        """Acknowledge and delete an entry, if this process still holds it."""
        self._run(_RELEASE, stream=stream, entry=entry, consumer=consumer_name())

    def requeue(self, message: virtual.Message) -> None:
        """Put a message at the end of its queue, as redelivered, if this process still holds it."""
        payload = message._raw
        info = payload["properties"]["delivery_info"]
        lane = StreamLane.of(info.pop("queue"), self.global_keyprefix)
        stream, entry = info.pop("stream"), info.pop("entry")
        info["redelivered"] = True
        self._run(
            _REQUEUE,
            lane=lane.key,
            stream=stream,
            entry=entry,
            consumer=consumer_name(),
            priority=self._get_message_priority(payload),
            payload=dumps(payload),
        )

    def forget(self, delivery_tag: str) -> None:
        """Free the credit of a message that a script has settled, or that others have now."""
        self.qos.forget(delivery_tag)

    # Waiting: one BRPOP on the bells of the lanes and on the lists

    def _brpop_start(self, timeout: float | None = None) -> None:
        if fresh := {q: lane for q, lane in self._lanes.items() if q not in self._opened}:
            self._beat()
            for queue, lane in fresh.items():
                self._open(queue, lane)
        if not self.qos.can_consume() or monotonic() - self._refused_at < REFUSED_PAUSE_S:
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        keys = [key for queue in queues for key in self._wait_keys(queue)]
        if not keys:
            return
        seconds = self.brpop_timeout if timeout is None else timeout
        self.client.connection.send_command("BRPOP", *keys, seconds or 0)

    def _wait_keys(self, queue: str) -> list[str]:
        lane = self._lane(queue)
        if lane is not None:
            # Without credit the bell would wake this channel again and again for nothing.
            return [lane.bell] if self._credit(queue) else []
        return [f"{self.global_keyprefix}{self._q_for_pri(queue, p)}" for p in self.priority_steps]

    def _brpop_read(self, **options: Any) -> bool:
        reply = self._brpop_reply(**options)
        if self._closing:
            return self._put_back(reply)
        key, item = map(bytes_to_str, reply or (b"", b""))
        # The client has removed the prefix.
        bell = self.global_keyprefix + key
        rung = {queue: lane for queue, lane in self._lanes.items() if lane.bell == bell}
        if not reply or rung:
            for queue in rung:
                self._queue_cycle.rotate(queue)
            # Fetch after a timeout too: a consumer that dies just after it took the bell loses it.
            if not self._fetch(rung or self._lanes):
                raise Empty
            return True
        queue = key.rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        self._deliver_checked(item, queue)
        return True

    def _deliver_checked(self, payload: str | bytes, queue: str) -> None:
        """Deliver a message of remote control or events; one that cannot be read is dropped."""
        try:
            self.connection._deliver(checked(str_to_bytes(payload)), queue)
        except _CONNECTION_LOST:
            raise
        except Exception:
            logger.exception("A message of %s cannot be read, and is dropped", queue)

    def _deliver_fanout_message(self, message: dict[str, Any], exchange: str) -> bool:
        self._deliver_checked(dumps(message), self._fanout_to_queue[exchange])
        return True

    def _brpop_reply(self, **options: Any) -> list[bytes] | None:
        try:
            client = self.client
            return client.parse_response(client.connection, "BRPOP", **options)  # type: ignore[no-any-return]
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        except redis.ResponseError as exc:
            if not is_refusal(exc):
                raise
            # BRPOP is a write, and is refused at once; without a pause it would be sent in a loop.
            self._refused_at = monotonic()
            return None
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _put_back(self, reply: list[bytes] | None) -> bool:
        """Put back what arrives while the channel closes: a bell, or the message of a list."""
        if reply:
            self.commands.rpush(self.global_keyprefix + bytes_to_str(reply[0]), reply[1])
        return False

    # Heartbeats

    def tend(self) -> None:
        """When a heartbeat is due: report, move due messages, and take over from the dead."""
        if self._lanes and self._liveness.due:
            self._beat()

    def _beat(self) -> None:
        lanes = self._lanes
        self._liveness.begin()
        answer = self._careful(
            _TEND,
            lanes=[lane.key for lane in lanes.values()],
            consumer=consumer_name(),
            lease_ms=self._lease_ms,
        )
        if not answer:
            return
        redis_ms, consumers = answer
        dead = self._liveness.dead(self.commands, redis_ms, consumers)
        for (queue, lane), reports in zip(lanes.items(), dead, strict=True):
            for name, report in reports.items():
                self._take_over(queue, lane, name, report)

    def _take_over(self, queue: str, lane: StreamLane, dead: str, report: bytes) -> None:
        # The oldest messages do not wait for credit. Later heartbeats claim what is over the limit.
        limit = self.qos.prefetch_count or UNLIMITED_FETCH
        if self.qos.held(queue) > 2 * limit:
            return
        claimed = self._careful(
            _CLAIM, lane=lane.key, dead=dead, report=report, consumer=consumer_name(), limit=limit
        )
        if claimed:
            logger.warning("%s is dead; took over %d messages of %s", dead, len(claimed), queue)
        self._hand_out(queue, lane, claimed, redelivered=True)
