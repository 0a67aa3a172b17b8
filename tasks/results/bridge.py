"""Results from Redis to whoever waits for them in this process.

All who wait in a process, be it HTTP calls, sockets or ensembles, share one Redis connection. It is
subscribed to a channel of the process' own, on which it is told of tasks that it has submitted, of
a whole batch at once; and to the channels of those other tasks that its clients wait for::

    expect() -----------------------------+        +--> callback
    subscribe() --+                       |        |
    wait() -------+--> writer => Redis => reader --+--> callback

The writer sends many subscriptions in one SUBSCRIBE, followed in the same write by one EXISTS for
their results: with RESP3 a subscribed connection may also ask. Redis answers in order, so a result
is either announced to us after the SUBSCRIBE, or was stored before it and is counted by the EXISTS;
only then it is fetched. That serves those who come late, and costs the others nothing. After a lost
connection it is done for everyone who still waits.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import cached_property

import redis
from redis.connection import AbstractConnection

from inferno import names
from tasks.results.resp import Reply, ReplyReader, pack
from tasks.state.outcomes import Outcome, decode_outcome, decode_outcomes
from tasks.state.records import Records
from tasks.transport import consumer_name

log = logging.getLogger(__name__)

_CHANNEL_PREFIX = names.result_key("").encode()


class Subscription:
    """One client's interest in one task. Its callback is called at most once."""

    __slots__ = ("_bridge", "callback", "channel")

    def __init__(self, bridge: Bridge, channel: bytes, callback: Callable[[Outcome], None]) -> None:
        self._bridge = bridge
        self.channel = channel
        self.callback = callback

    def close(self) -> None:
        """Lose interest; the callback is not called any more, unless it is running already."""
        self._bridge.unsubscribe(self)


class Waiter:
    """Waits for one task's outcome."""

    __slots__ = ("_gate", "_outcome", "_subscription")

    def __init__(self, bridge: Bridge, task_id: str, *, expected: bool = False) -> None:
        """Begin to wait.

        Args:
          bridge: brings the outcome.
          task_id: whose.
          expected: as `Bridge.expect`; otherwise as `Bridge.subscribe`.
        """
        # A lock is the cheapest one-shot signal: an Event is made of three of them.
        self._gate = threading.Lock()
        self._gate.acquire()
        self._outcome: Outcome | None = None
        begin = bridge.expect if expected else bridge.subscribe
        self._subscription = begin(task_id, self._arrived)

    def __enter__(self) -> Waiter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._outcome is None:
            self._subscription.close()

    def wait(self, timeout_s: float) -> Outcome | None:
        """Return the outcome, or None when it does not arrive within that many seconds."""
        if self._outcome is None and timeout_s > 0:
            self._gate.acquire(timeout=timeout_s)
        return self._outcome

    def _arrived(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._gate.release()


class Bridge:
    """The subscribed connection of a process.

    It starts with the first subscription, and so after gunicorn has forked.
    """

    #: How long an UNSUBSCRIBE may wait for a SUBSCRIBE to travel with, in seconds.
    LINGER_S = 0.1
    #: So many of them do not wait.
    LINGER_CHANNELS = 256
    #: Delay after the first and after later attempts to connect, in seconds.
    BACKOFF_S = (0.05, 2.0)

    def __init__(self, client: redis.Redis, records: Records, prefix: str, name: str) -> None:
        """Store where the results come from.

        Args:
          client: knows how to connect; the bridge opens a connection of its own.
          records: for results that were stored before anyone waited.
          prefix: of the platform's own keys and channels.
          name: of the connection, for those who look at Redis.
        """
        self._name = name
        self._pool = client.connection_pool
        self._prefix = prefix
        self._records = records
        # With its default lock: under gevent, to notify with a plain one lets others run meanwhile,
        # so that every subscription travels alone.
        self._changed = threading.Condition()
        self._waiting: dict[bytes, list[Subscription]] = {}
        #: Subscriptions that the writer has not seen yet, and channels that it may leave.
        self._fresh: list[Subscription] = []
        self._left: list[bytes] = []
        #: What belongs to the present connection: the channels that it is subscribed to, and those
        #: of each EXISTS that is not answered yet.
        self._socket: socket.socket | None = None
        self._channels: set[bytes] = set()
        self._asked: deque[list[bytes]] = deque()
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the reader and the writer, unless they run already."""
        with self._changed:
            if self._threads or self._stopping.is_set():
                return
            self._threads = [
                threading.Thread(target=run, name=f"bridge-{name}", daemon=True)
                for name, run in (("reader", self._read), ("writer", self._write))
            ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close the connection and end the threads; what is still waited for never arrives."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
            if self._socket is not None:
                _abort(self._socket)
        for thread in self._threads:
            thread.join()

    def wait(self, task_id: str, timeout_s: float) -> Outcome | None:
        """Return a task's outcome, or None when it does not arrive within that many seconds."""
        with Waiter(self, task_id) as waiter:
            return waiter.wait(timeout_s)

    @cached_property
    def reply_to(self) -> str:
        """The channel on which this process is told of the tasks that it has submitted."""
        return names.reply_channel(self._prefix, consumer_name())

    def expect(self, task_id: str, callback: Callable[[Outcome], None]) -> Subscription:
        """Have a callback called once with the outcome of a task of our own.

        Args:
          task_id: the task is not submitted yet, and will be with our `reply_to`.
          callback: called in the bridge's thread; must not block.
        """
        if not self._threads:
            self.start()
        subscription = Subscription(self, names.result_key(task_id).encode(), callback)
        with self._changed:
            self._waiting.setdefault(subscription.channel, []).append(subscription)
        return subscription

    def subscribe(self, task_id: str, callback: Callable[[Outcome], None]) -> Subscription:
        """Have a callback called once with a task's outcome, also when it was stored long ago.

        Args:
          task_id: the task need not exist yet.
          callback: called in the bridge's thread; must not block.
        """
        if not self._threads:
            self.start()
        subscription = Subscription(self, names.result_key(task_id).encode(), callback)
        with self._changed:
            self._waiting.setdefault(subscription.channel, []).append(subscription)
            self._fresh.append(subscription)
            if len(self._fresh) == 1:
                self._changed.notify()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; does nothing when its outcome was delivered."""
        with self._changed:
            subscriptions = self._waiting.get(subscription.channel, [])
            if subscription in subscriptions:
                subscriptions.remove(subscription)
                if not subscriptions:
                    self._leave(subscription.channel)

    def awaits(self, task_id: str) -> bool:
        """Return whether somebody in this process waits for a task."""
        return names.result_key(task_id).encode() in self._waiting

    def _leave(self, channel: bytes) -> None:
        del self._waiting[channel]
        if channel not in self._channels and not self._fresh:
            return  # It was expected, and has no channel.
        self._left.append(channel)
        # The writer starts its timer with the first, and does not wait for more than so many.
        if len(self._left) in (1, self.LINGER_CHANNELS):
            self._changed.notify()

    def _write(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                while not self._is_urgent():
                    lingering = bool(self._left) and self._socket is not None
                    if not self._changed.wait(self.LINGER_S if lingering else None):
                        break
                sock = self._socket
                commands = self._next_commands() if sock is not None else b""
            if sock is not None and commands:
                _send(sock, commands)

    def _is_urgent(self) -> bool:
        if self._stopping.is_set() or self._socket is None:
            return self._stopping.is_set()
        return bool(self._fresh) or len(self._left) >= self.LINGER_CHANNELS

    def _next_commands(self) -> bytes:
        asked = list({s.channel for s in self._fresh if s.channel in self._waiting})
        joined = [channel for channel in asked if channel not in self._channels]
        left = [c for c in set(self._left) if c in self._channels and c not in self._waiting]
        self._fresh, self._left = [], []
        self._channels.update(joined)
        self._channels.difference_update(left)
        if asked:
            self._asked.append(asked)
        commands = ((b"SUBSCRIBE", joined), (b"EXISTS", asked), (b"UNSUBSCRIBE", left))
        return b"".join(pack(command, channels) for command, channels in commands if channels)

    def _read(self) -> None:
        delay = self.BACKOFF_S[0]
        while not self._stopping.is_set():
            try:
                connection = self._connect()
            except (redis.RedisError, OSError) as exc:
                log.warning("No connection for results, next attempt in %g s: %s", delay, exc)
                self._stopping.wait(delay)
                delay = min(2 * delay, self.BACKOFF_S[1])
                continue
            delay = self.BACKOFF_S[0]
            try:
                replies = self._join(connection)
                while True:
                    self._handle(replies.read())
            except Exception as exc:
                # Whatever it was: everyone who still waits is subscribed and looked up again.
                if not self._stopping.is_set():
                    log.warning("The connection for results was lost: %s", exc)
                    self._stopping.wait(delay)
            finally:
                with self._changed:
                    self._socket = None
                connection.disconnect()  # type: ignore[no-untyped-call]

    def _connect(self) -> AbstractConnection:
        options = self._pool.connection_kwargs
        connection: AbstractConnection = self._pool.connection_class(
            **options
            | {
                "protocol": 3,
                "socket_timeout": options.get("socket_connect_timeout"),
                "client_name": self._name,
                "maint_notifications_config": None,
                "maint_notifications_pool_handler": None,
            }
        )
        connection.connect()  # type: ignore[no-untyped-call]
        return connection

    def _join(self, connection: AbstractConnection) -> ReplyReader:
        # redis-py only makes the connection; its own ways to use one reconnect behind our back.
        sock: socket.socket = connection._sock  # type: ignore[assignment]
        replies = ReplyReader(sock.recv)
        # Who expects an outcome from here on relies on this.
        sock.sendall(pack(b"SUBSCRIBE", [self.reply_to.encode()]))
        replies.read()
        # From here silence is no error; keep-alive finds out when the other side is gone.
        sock.settimeout(None)
        with self._changed:
            self._socket = sock
            self._channels.clear()
            self._asked.clear()
            self._left = []
            self._fresh = [s for subscriptions in self._waiting.values() for s in subscriptions]
            self._changed.notify()
            if self._stopping.is_set():
                _abort(sock)
        return replies

    def _handle(self, reply: Reply) -> None:
        match reply:
            case [b"message", bytes(channel), bytes(payload)]:
                self._announced(channel, payload)
            case int(count):
                # The answer to an EXISTS.
                with self._changed:
                    asked = self._asked.popleft()
                if count:
                    self._fetch(asked)

    def _announced(self, channel: bytes, payload: bytes) -> None:
        try:
            if channel.startswith(_CHANNEL_PREFIX):
                outcome = decode_outcome(payload)
                outcomes = [] if outcome is None else [outcome]
            else:
                outcomes = decode_outcomes(payload)
        except Exception:
            log.exception("Something else than a result was published on %r", channel)
            return
        for outcome in outcomes:
            self._deliver(outcome)

    def _fetch(self, channels: list[bytes]) -> None:
        task_ids = [channel.removeprefix(_CHANNEL_PREFIX).decode() for channel in channels]
        for outcome in self._records.outcomes(task_ids).values():
            self._deliver(outcome)

    def _deliver(self, outcome: Outcome) -> None:
        channel = names.result_key(outcome.task_id).encode()
        with self._changed:
            subscriptions = self._waiting.get(channel)
            if subscriptions is None:
                return
            self._leave(channel)
        for subscription in subscriptions:
            try:
                subscription.callback(outcome)
            except Exception:
                log.exception("A client could not be told that task %s is over", outcome.task_id)


def _send(sock: socket.socket, commands: bytes) -> None:
    try:
        sock.sendall(commands)
    except OSError:
        _abort(sock)


def _abort(sock: socket.socket) -> None:
    # The reader, who may be blocked in `recv`, sees the end of the stream and takes care.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
