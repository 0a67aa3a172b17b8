"""The channel: queues as streams, what is in our hands, and who lives."""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from queue import Empty
from time import monotonic
from typing import Any

import orjson
import redis
from kombu.log import get_logger
from kombu.transport import redis as lists
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis.backoff import NoBackoff
from redis.retry import Retry

from tasks.transport.script import Script

logger = get_logger(__name__)

#: Queues that are lists as on the stock transport: of remote control, of events, and replies, which
#: are named by a UUID.
LISTS = re.compile(r".*\.pidbox|celeryev\..*|[0-9a-f]{8}-[0-9a-f-]{27}")

#: Messages of one fetch when the prefetch count sets no limit.
UNLIMITED_FETCH = 100

#: How the errors of a Redis begin that refuses writes for a while: it is full, or cannot save them.
REFUSALS = re.compile("OOM|MISCONF|READONLY|NOREPLICAS|MASTERDOWN|BUSY|LOADING|.*OOM command")

#: Streams of a lane, in the order in which they are handed out; as in `lua/lane.lua`.
STREAMS = ("returned", *"9876543210")

_PUBLISH = Script("tasks.transport", "publish")
_FETCH = Script("tasks.transport", "fetch")
_HELD = Script("tasks.transport", "held")
_TEND = Script("tasks.transport", "tend")
_CLAIM = Script("tasks.transport", "claim")
_RELEASE = Script("tasks.transport", "release")
_REQUEUE = Script("tasks.transport", "requeue")
_GIVE_BACK = Script("tasks.transport", "give_back")
_LEAVE = Script("tasks.transport", "leave")
_SIZE = Script("tasks.transport", "size")
_PURGE = Script("tasks.transport", "purge")
_DELETE = Script("tasks.transport", "delete")

_process: tuple[int, str] = (0, "")

#: Numbers of the messages that this process packs.
_tags = count()


def consumer_name() -> str:
    """Return this process's name as a consumer, the same until it ends.

    A connection with this as its client name is a sign of the process's life.
    """
    global _process
    if _process[0] != os.getpid():
        _process = os.getpid(), f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
    return _process[1]


@dataclass(frozen=True)
class Lane:
    """The keys of one queue."""

    #: All of its keys begin with this and a colon: ``0`` to ``9`` and ``returned`` are streams,
    #: ``delayed`` a sorted set, ``bell`` a list, ``consumers`` a hash, ``paused`` a string.
    key: str

    @classmethod
    def of(cls, queue: str, global_keyprefix: str = "") -> Lane:
        """Return the lane of a queue. No key is the queue's name: stock tools call LLEN on that."""
        return cls(f"{global_keyprefix}stream:{queue}")

    @property
    def bell(self) -> str:
        """The list that wakes a waiting consumer."""
        return f"{self.key}:bell"

    @property
    def paused(self) -> str:
        """While this key exists, nothing is handed out."""
        return f"{self.key}:paused"

    def pause(self, client: redis.Redis) -> None:
        """Hand out nothing more; what is in someone's hands is finished."""
        client.set(self.paused, 1)

    def resume(self, client: redis.Redis) -> None:
        """Hand out what waits again."""
        with client.pipeline() as pipe:
            pipe.delete(self.paused)
            pipe.lpush(self.bell, 1)
            pipe.execute()

    def leave(self, client: redis.Redis) -> int:
        """Give back what this process holds, to be handed out first, and sign off.

        For the end of a process; otherwise others find out by themselves, a little later.

        Returns:
          how many messages were given back.
        """
        return int(_LEAVE.run(client, {"lane": self.key, "consumer": consumer_name()}))

    def give_back(self, client: redis.Redis, entries: Iterable[tuple[str, str]]) -> int:
        """Give back some messages of this process, to be handed out first.

        Args:
          client: of their Redis.
          entries: stream and id of each.
        Returns:
          how many were still ours.
        """
        fields = {"lane": self.key, "consumer": consumer_name(), "entries": list(entries)}
        return int(_GIVE_BACK.run(client, fields))


def pack(
    body: str,
    queue: str,
    *,
    headers: dict[str, Any],
    properties: dict[str, Any],
    priority: int = 0,
    content_type: str = "application/json",
    content_encoding: str = "utf-8",
) -> bytes:
    """Return a message as it stands in a stream, for scripts that publish by `scripts.LIBRARY`.

    It is what kombu's producer writes for a message to the default exchange.
    """
    return orjson.dumps(
        {
            "body": body,
            "content-encoding": content_encoding,
            "content-type": content_type,
            "headers": headers,
            "properties": {
                **properties,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "body_encoding": "utf-8",
                "delivery_tag": f"{consumer_name()}:{next(_tags)}",
            },
        }
    )


class Message(virtual.Message):  # type: ignore[misc]
    """A message whose JSON is read by a faster library than kombu's."""

    def __init__(self, payload: dict[str, Any], channel: Any = None, **kwargs: Any) -> None:
        headers, properties = payload.get("headers") or {}, payload["properties"]
        encoding = properties.get("body_encoding")
        try:
            body = payload["body"].encode()
        except (LookupError, AttributeError, UnicodeEncodeError):
            body = None
        if kwargs or body is None or encoding != "utf-8" or "compression" in headers:
            super().__init__(payload, channel=channel, **kwargs)
            return
        # What kombu's constructors come to for a body that needs no other treatment.
        self._raw = payload
        self.errors: list[Any] = []
        self.channel = channel
        self.delivery_tag = properties["delivery_tag"]
        self.content_type = payload.get("content-type")
        self.content_encoding = payload.get("content-encoding")
        self.delivery_info = properties.get("delivery_info") or {}
        self.headers = headers
        self.properties = properties
        self.body = body
        self.accept = None
        self._decoded_cache = None
        self._state = "RECEIVED"

    def _decode(self) -> Any:
        accepted = self.accept is None or self.content_type in self.accept
        if self.content_type == "application/json" and accepted and not self.errors:
            with suppress(ValueError):  # Such as NaN, which Python's own JSON knows.
                return _loads(self.body)
        return super()._decode()


#: Is given what one fetch has brought of a queue, and returns what is left to the queue's consumer.
Taker = Callable[[list[virtual.Message]], list[virtual.Message]]


class QoS(lists.QoS):  # type: ignore[misc]
    """Keeps count of what is in our hands; for streams, Redis knows the rest."""

    def append(self, message: virtual.Message, delivery_tag: str) -> None:
        """Take note of a delivered message."""
        if _entry(message) is None:
            super().append(message, delivery_tag)
        else:
            virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message, and delete it."""
        entry = _entry(self._delivered.get(delivery_tag))
        if entry is None:
            super().ack(delivery_tag)
        else:
            self.channel.release(*entry)
            self.forget(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Delete a message, or put it at the end of its line."""
        message = self._delivered.get(delivery_tag)
        entry = _entry(message)
        if entry is None:
            super().reject(delivery_tag, requeue)
            return
        if requeue:
            self.channel.requeue(message)
        else:
            self.channel.release(*entry)
        self.forget(delivery_tag)

    def forget(self, delivery_tag: str) -> None:
        """Free the place of a message that was settled by a script, or is no longer ours."""
        self._quick_ack(delivery_tag)

    def holds(self, delivery_tag: str) -> bool:
        """Return whether a message is in our hands already."""
        return delivery_tag in self._delivered and delivery_tag not in self._dirty

    def held(self, queue: str) -> int:
        """Return how many messages of a queue are in our hands."""
        self._flush()
        return sum(
            message.delivery_info.get("queue") == queue for message in self._delivered.values()
        )

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Restore what lists have delivered to those who are gone; streams need no such thing."""
        if self.channel.consumes_lists:
            try:
                super().restore_visible(*args, **kwargs)
            except redis.ResponseError as exc:
                if not _is_refusal(exc):
                    raise

    def restore_unacked(self, client: Any = None) -> None:
        """Put everything unacknowledged at the end of its line."""
        self._flush()
        for tag, message in list(self._delivered.items()):
            if _entry(message) is not None:
                self.channel.requeue(message)
                del self._delivered[tag]
        super().restore_unacked(client)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Restore what lists have delivered, when the channel closes.

        What streams have delivered stays ours: the process may be working on it, and find it again
        through its next channel. When it ends, others take over.
        """
        for tag, message in list(self._delivered.items()):
            if _entry(message) is not None:
                del self._delivered[tag]
        super().restore_unacked_once(stderr)


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

    #: Heartbeats missed before a consumer's connections are looked for.
    SUSPICIOUS_BEATS = 3
    #: Times that its connections must be missing, in a row, before it counts as dead.
    ABSENCES = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client: Any = None
        self._commands: redis.Redis | None = None
        #: How many have received the last message of each fanout exchange.
        self.audience: dict[str, int] = {}
        #: Queues whose held messages have been handed out to this channel.
        self._opened: set[str] = set()
        #: By queue, who takes new messages together, and past what kombu does for each of them.
        self.takers: dict[str, Taker] = {}
        self._tended_at = float("-inf")
        self._reported_at = float("-inf")
        self._patient_until = float("-inf")
        self._absent: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    # Connections

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        # A repeated write could be done twice, and a dead Redis shall be noticed at once.
        params: dict[str, Any] = super()._connparams(asynchronous)
        return params | {"client_name": consumer_name(), "retry": Retry(NoBackoff(), 0)}

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """Yield a client; the same each time, because making one takes as long as a command."""
        if client is None and self._client is None:
            self._client = self._create_client()
        yield client or self._client

    @property
    def commands(self) -> redis.Redis:
        """A client that adds no prefix, for our own keys."""
        if self._commands is None:
            self._commands = redis.Redis(connection_pool=self.pool)
        return self._commands

    def _disconnect_pools(self) -> None:
        self._client = self._commands = None
        super()._disconnect_pools()

    def _run(self, script: Script, **fields: Any) -> Any:
        return script.run(self.commands, fields)

    # Queues

    def lane(self, queue: str) -> Lane | None:
        """Return the keys of a queue, or None when it is no stream."""
        if LISTS.fullmatch(queue):
            return None
        return Lane.of(queue, self.global_keyprefix)

    @property
    def _lanes(self) -> dict[str, Lane]:
        """The lanes that this channel consumes, by queue."""
        lanes = {queue: self.lane(queue) for queue in self.active_queues}
        return {queue: lane for queue, lane in lanes.items() if lane is not None}

    @property
    def consumes_lists(self) -> bool:
        """Whether this channel consumes ordinary lists, too."""
        return len(self._lanes) < len(self.active_queues)

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        lane = self.lane(queue)
        if lane is None:
            super()._put(queue, message, **kwargs)
            return
        self._run(
            _PUBLISH,
            lane=lane.key,
            priority=self._get_message_priority(message),
            due_ms=_due_ms(message),
            payload=dumps(message),
        )

    def _put_fanout(
        self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any
    ) -> None:
        with self.conn_or_acquire() as client:
            topic = self._get_publish_topic(exchange, routing_key)
            self.audience[exchange] = client.publish(topic, dumps(message))

    def _get(self, queue: str) -> dict[str, Any]:
        lane = self.lane(queue)
        if lane is None:
            return super()._get(queue)  # type: ignore[no-any-return]
        for entry in self._take(lane, 1):
            if (message := self._read(queue, lane, entry)) is not None:
                return message
        raise Empty

    def _size(self, queue: str) -> int:
        lane = self.lane(queue)
        return int(super()._size(queue) if lane is None else self._run(_SIZE, lane=lane.key))

    def _purge(self, queue: str) -> int:
        lane = self.lane(queue)
        return int(super()._purge(queue) if lane is None else self._run(_PURGE, lane=lane.key))

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any
    ) -> None:
        """Delete a queue with everything in it."""
        lane = self.lane(queue)
        if lane is not None and not (if_empty and self._size(queue)):
            self._run(_DELETE, lane=lane.key)
        super().queue_delete(queue, if_unused, if_empty, **kwargs)

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        lane = self.lane(queue)
        if lane is None:
            return bool(super()._has_queue(queue, **kwargs))
        # A stream exists while it holds messages, its consumers while someone listens.
        return bool(self._size(queue) or self.commands.exists(f"{lane.key}:consumers"))

    def _stream(self, queue: str) -> Lane:
        lane = self.lane(queue)
        if lane is None:
            raise ValueError(f"the queue {queue!r} is no stream")
        return lane

    # Messages in our hands

    def release(self, stream: str, entry: str) -> None:
        """Acknowledge and delete an entry, if this process still holds it."""
        self._run(_RELEASE, stream=stream, entry=entry, consumer=consumer_name())

    def requeue(self, message: virtual.Message) -> None:
        """Put a message at the end of its line, as redelivered, if it is still ours."""
        payload = message._raw
        info = payload["properties"]["delivery_info"]
        lane = self._stream(info.pop("queue"))
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
        """Free the place of a message that a script has settled, or that is no longer ours."""
        self.qos.forget(delivery_tag)

    def fetch(self) -> bool:
        """Hand out what waits, as far as there is credit; returns whether there was anything."""
        return self._fetch(self._lanes)

    @property
    def _lease_ms(self) -> int:
        return round(self.lease * 1000)

    def _credit(self, queue: str) -> int:
        """Return how many messages of a queue may be taken.

        Queues share the prefetch count evenly, so that a long one leaves room for the others.
        """
        credit = self.qos.can_consume_max_estimate()
        if credit is None:
            return UNLIMITED_FETCH
        count = len(self._lanes)
        if count > 1:
            share = -(-self.qos.prefetch_count // count)
            credit = min(credit, max(share - self.qos.held(queue), 0))
        return int(credit)

    def _fetch(self, lanes: dict[str, Lane]) -> bool:
        found = False
        for queue, lane in lanes.items():
            if most := self._credit(queue):
                found |= self._hand_out(queue, lane, self._take(lane, most))
        return found

    def _take(self, lane: Lane, most: int) -> list[Any]:
        return self._careful(
            _FETCH, lane=lane.key, consumer=consumer_name(), lease_ms=self._lease_ms, limit=most
        )

    def _careful(self, script: Script, **fields: Any) -> list[Any]:
        """Run a script that hands something over to us.

        When the answer is lost, it is in our hands without our knowing: we look again. When Redis
        refuses writes, because it is full or cannot save them, there is nothing for now.
        """
        try:
            entries: list[Any] = self._run(script, **fields)
        except self.connection_errors:
            self._opened.clear()
            raise
        except redis.ResponseError as exc:
            if not _is_refusal(exc):
                raise
            logger.warning("Redis hands out nothing for now: %s", exc)
            return []
        return entries

    def _open(self, queue: str, lane: Lane) -> None:
        """Begin to consume: with what is in our hands unknown to this channel, then what waits."""
        self._opened.add(queue)
        held = self._run(_HELD, lane=lane.key, consumer=consumer_name())
        self._hand_out(queue, lane, held, redelivered=True)
        self._fetch({queue: lane})

    def _hand_out(
        self, queue: str, lane: Lane, entries: list[Any], redelivered: bool = False
    ) -> bool:
        qos, taker = self.qos, None if redelivered else self.takers.get(queue)
        taken: list[virtual.Message] = []
        for entry in entries:
            message = self._read(queue, lane, entry)
            if message is None or qos.holds(message["properties"]["delivery_tag"]):
                continue
            if redelivered:
                message["properties"]["delivery_info"]["redelivered"] = True
            if taker is None:
                self.connection._deliver(message, queue)
            else:
                taken.append(self.Message(message, channel=self))
                virtual.QoS.append(qos, taken[-1], taken[-1].delivery_tag)
        for left in taker(taken) if taker is not None and taken else ():
            self.connection._deliver(left._raw, queue)
        return bool(entries)

    def _read(self, queue: str, lane: Lane, entry: list[bytes]) -> dict[str, Any] | None:
        stream, entry_id, payload = entry
        try:
            message: dict[str, Any] = _loads(payload)
            info = message["properties"].setdefault("delivery_info", {})
            hash(message["properties"]["delivery_tag"])
        except (ValueError, TypeError, LookupError, AttributeError):
            # Kept, but out of the way: it would come back for ever.
            logger.exception(
                "A message of %s cannot be read; see %s:unreadable", lane.key, lane.key
            )
            self.commands.xadd(f"{lane.key}:unreadable", {"message": payload}, maxlen=1000)
            self.release(bytes_to_str(stream), bytes_to_str(entry_id))
            return None
        info["queue"] = queue
        info["stream"] = bytes_to_str(stream)
        info["entry"] = bytes_to_str(entry_id)
        return message

    # Waiting: one BRPOP for the bells of streams and the ordinary lists

    def _brpop_start(self, timeout: float | None = None) -> None:
        if fresh := {q: lane for q, lane in self._lanes.items() if q not in self._opened}:
            self._beat()
            for queue, lane in fresh.items():
                self._open(queue, lane)
        if not self.qos.can_consume():
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
        lane = self.lane(queue)
        if lane is not None:
            # Else the bell would wake us for nothing, again and again.
            return [lane.bell] if self._credit(queue) else []
        return [f"{self.global_keyprefix}{self._q_for_pri(queue, p)}" for p in self.priority_steps]

    def _brpop_read(self, **options: Any) -> bool:
        try:
            try:
                reply = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if self._closing:
            return self._put_back(reply)
        key, item = map(bytes_to_str, reply or (b"", b""))
        # The client has taken the prefix off.
        bell = self.global_keyprefix + key
        rung = {queue: lane for queue, lane in self._lanes.items() if lane.bell == bell}
        if not reply or rung:
            for queue in rung:
                self._queue_cycle.rotate(queue)
            # Without a bell too: it is lost with a consumer that dies just after it took it.
            if not self._fetch(rung or self._lanes):
                raise Empty
            return True
        queue = key.rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        self.connection._deliver(loads(item), queue)
        return True

    def _put_back(self, reply: list[bytes] | None) -> bool:
        """Hand on what arrives while we close: the bell, or the message of a list."""
        if reply:
            self.commands.rpush(self.global_keyprefix + bytes_to_str(reply[0]), reply[1])
        return False

    # Who lives

    def tend(self) -> None:
        """Report, move what is due, and take over what dead consumers held; in due time only."""
        if self._lanes and monotonic() >= self._tended_at + self.heartbeat_interval:
            self._beat()

    def _beat(self) -> None:
        lanes, now = self._lanes, monotonic()
        self._tended_at = now
        keys = [lane.key for lane in lanes.values()]
        answer = self._careful(_TEND, lanes=keys, consumer=consumer_name(), lease_ms=self._lease_ms)
        if not answer:
            return
        redis_ms, consumers = answer
        first = self._reported_at == float("-inf")
        # We may not have been the only ones who could not report.
        if not first and now - self._reported_at > self._suspicious_s:
            self._patient_until = now + self.grace
        self._reported_at = now
        reports = [
            dict(zip(map(bytes_to_str, flat[::2]), flat[1::2], strict=True)) for flat in consumers
        ]
        returning = [r.pop(consumer_name(), None) is not None for r in reports]
        if first and any(returning):
            self._patient_until = now + self.grace
        dead = self._dead(reports, redis_ms)
        for (queue, lane), others in zip(lanes.items(), reports, strict=True):
            for name in others.keys() & dead:
                self._take_over(queue, lane, name, others[name])

    @property
    def _suspicious_s(self) -> float:
        return self.SUSPICIOUS_BEATS * self.heartbeat_interval

    def _dead(self, reports: list[dict[str, bytes]], redis_ms: int) -> set[str]:
        """Return which consumers are dead, given what each reported last."""
        # One that has stopped to consume a queue reports for the others.
        newest: dict[str, tuple[int, int]] = {}
        for name, report in (item for lane in reports for item in lane.items()):
            reported_ms, lease_ms = map(int, report.split())
            newest[name] = max(newest.get(name, (0, 0)), (reported_ms, lease_ms))
        suspects, dead = set(), set()
        for name, (reported_ms, lease_ms) in newest.items():
            silence_ms = redis_ms - reported_ms
            if silence_ms > lease_ms:
                dead.add(name)
            elif silence_ms > self._suspicious_s * 1000:
                suspects.add(name)
        if suspects:
            suspects -= {client["name"] for client in self.commands.client_list()}
        self._absent = {name: self._absent.get(name, 0) + 1 for name in suspects}
        dead |= {name for name, times in self._absent.items() if times >= self.ABSENCES}
        return set() if dead and self._everyone_is_returning() else dead

    def _everyone_is_returning(self) -> bool:
        if monotonic() < self._patient_until:
            return True
        return int(self.commands.info("server")["uptime_in_seconds"]) < self.grace

    def _take_over(self, queue: str, lane: Lane, dead: str, report: bytes) -> None:
        # What has waited longest should not wait for credit; the rest follows with the next beat.
        most = self.qos.prefetch_count or UNLIMITED_FETCH
        if self.qos.held(queue) > 2 * most:
            return
        claimed = self._careful(
            _CLAIM, lane=lane.key, dead=dead, report=report, consumer=consumer_name(), limit=most
        )
        if claimed:
            logger.warning("%s is gone; %d messages of %s taken over", dead, len(claimed), queue)
        self._hand_out(queue, lane, claimed, redelivered=True)


def _loads(payload: bytes) -> Any:
    # kombu's clients may have written types of their own, as objects that say so.
    if b'"__type__"' in payload:
        return loads(bytes_to_str(payload))
    return orjson.loads(payload)


def _is_refusal(exc: redis.ResponseError) -> bool:
    refused = isinstance(exc, redis.OutOfMemoryError | redis.ReadOnlyError)
    return refused or REFUSALS.match(str(exc)) is not None


def _entry(message: virtual.Message | None) -> tuple[str, str] | None:
    """Return the stream and id of a delivered message, or None when it came out of a list."""
    info = message.delivery_info if message is not None else {}
    return (info["stream"], info["entry"]) if "entry" in info else None


def _due_ms(message: dict[str, Any]) -> int | None:
    """Return when a message is due, in milliseconds since the epoch; None when it is due now."""
    eta = (message.get("headers") or {}).get("eta")
    if not eta:
        return None
    due = datetime.fromisoformat(eta)
    return round((due if due.tzinfo else due.replace(tzinfo=UTC)).timestamp() * 1000)
