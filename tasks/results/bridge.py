"""The last step of a task, deliver: outcomes go from Redis to the callers in this process.

All waiting callers of a process (HTTP calls, sockets, ensembles) share one Redis connection. It is
subscribed to a channel of the process itself, which announces the outcomes of the tasks that this
process submitted, a whole batch at once. It is also subscribed to the channel of each other task
that somebody waits for::

    expect() -----------------------------+        +--> callback
    subscribe() --+                       |        |
    wait() -------+--> writer => Redis => reader --+--> callback

The writer sends many subscriptions in one SUBSCRIBE, followed in the same write by one EXISTS for
their results: RESP3 lets a subscribed connection send other commands. Redis answers in order, so a
result is either announced after the SUBSCRIBE, or it was stored earlier and the EXISTS counts it.
Only a positive count leads to a fetch: late callers get their result, and the others pay nothing.
After a lost connection, everything that is still awaited is subscribed and looked up again.

Callbacks run in the reader's thread.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import hiredis
import redis
from redis.connection import AbstractConnection

from inferno import names
from tasks.state.outcomes import Outcome, decode_outcome, decode_outcomes
from tasks.state.records import Records
from tasks.transport import consumer_name

log = logging.getLogger(__name__)

_CHANNEL_PREFIX = names.result_key("").encode()
#: Bytes that are read from Redis at once.
_CHUNK = 65_536
#: What hiredis returns while a reply is incomplete; Redis itself may send None and False.
_INCOMPLETE = object()


class Subscription:
    """One caller that waits for one task. Its callback is called at most once."""

    __slots__ = ("_bridge", "callback", "channel")

    def __init__(self, bridge: Bridge, channel: bytes, callback: Callable[[Outcome], None]) -> None:
        self._bridge = bridge
        self.channel = channel
        self.callback = callback

    def close(self) -> None:
        """Stop waiting; the callback is not called from then on, but one call may be running."""
        self._bridge.unsubscribe(self)


class Waiter:
    """Waits for one task's outcome."""

    __slots__ = ("_arrival", "_outcome", "_subscription")

    def __init__(self, bridge: Bridge, task_id: str, *, expected: bool = False) -> None:
        """Begin to wait.

        Args:
          bridge: delivers the outcome.
          task_id: the task.
          expected: wait as with `Bridge.expect`, otherwise as with `Bridge.subscribe`.
        """
        self._arrival = threading.Event()
        self._outcome: Outcome | None = None
        begin = bridge.expect if expected else bridge.subscribe
        self._subscription = begin(task_id, self._arrived)

    def __enter__(self) -> Waiter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._outcome is None:
            self._subscription.close()

    def wait(self, timeout_s: float) -> Outcome | None:
        """Return the outcome, or None if it does not arrive within `timeout_s` seconds."""
        if self._outcome is None and timeout_s > 0:
            self._arrival.wait(timeout_s)
        return self._outcome

    def _arrived(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._arrival.set()


class Bridge:
    """The subscribed connection of a process.

    It starts with the first subscription, and therefore after gunicorn has forked.
    """

    #: Longest time that an UNSUBSCRIBE waits for a SUBSCRIBE to travel with, in seconds.
    LINGER_S = 0.1
    #: Number of channels to leave at which the UNSUBSCRIBE is sent at once.
    LINGER_CHANNELS = 256
    #: Number of stored results that are read at once.
    FETCHED = 16
    #: Shortest and longest pause between attempts to connect, in seconds.
    BACKOFF_S = (0.05, 2.0)

    def __init__(self, client: redis.Redis, records: Records, prefix: str, name: str) -> None:
        """Store where the results come from.

        Args:
          client: its settings are used for the bridge's own connection.
          records: returns results that were stored before anyone waited.
          prefix: prefix of the platform's keys and channels.
          name: name of the connection, as Redis lists it.
        """
        self._name = name
        self._pool = client.connection_pool
        self._prefix = prefix
        self._records = records
        # The default lock matters: under gevent, notifying with a plain Lock switches to other
        # greenlets, and every subscription would travel alone.
        self._changed = threading.Condition()
        self._waiting: dict[bytes, list[Subscription]] = {}
        #: Subscriptions that the writer has not sent yet, and channels that it may leave.
        self._fresh: list[Subscription] = []
        self._left: list[bytes] = []
        #: The current connection, the channels that it is subscribed to, and the channels of each
        #: EXISTS that Redis has not answered yet.
        self._socket: socket.socket | None = None
        self._channels: set[bytes] = set()
        self._looked_up: deque[list[bytes]] = deque()
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the reader and the writer, unless they already run."""
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
        """Close the connection and end the threads; what is still awaited never arrives."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
            if self._socket is not None:
                _abort(self._socket)
        for thread in self._threads:
            thread.join()

    def wait(self, task_id: str, timeout_s: float) -> Outcome | None:
        """Return a task's outcome, or None if it does not arrive within `timeout_s` seconds."""
        with Waiter(self, task_id) as waiter:
            return waiter.wait(timeout_s)

    @cached_property
    def reply_to(self) -> str:
        """Channel that announces the outcomes of the tasks that this process has submitted."""
        return names.reply_channel(self._prefix, consumer_name())

    def expect(self, task_id: str, callback: Callable[[Outcome], None]) -> Subscription:
        """Call a function once with the outcome of a task that this process is about to submit.

        Args:
          task_id: a task that will be submitted with the bridge's `reply_to`.
          callback: runs in the reader's thread; must not block.
        """
        if not self._threads:
            self.start()
        subscription = Subscription(self, names.result_key(task_id).encode(), callback)
        with self._changed:
            self._waiting.setdefault(subscription.channel, []).append(subscription)
        return subscription

    def subscribe(self, task_id: str, callback: Callable[[Outcome], None]) -> Subscription:
        """Call a function once with a task's outcome, even if it was stored long ago.

        Args:
          task_id: a task, which need not exist yet.
          callback: runs in the reader's thread; must not block.
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
        """End a subscription; does nothing if its outcome was delivered."""
        with self._changed:
            subscriptions = self._waiting.get(subscription.channel, [])
            if subscription in subscriptions:
                subscriptions.remove(subscription)
                if not subscriptions:
                    self._leave(subscription.channel)

    def awaits(self, task_id: str) -> bool:
        """Return whether a caller in this process waits for a task."""
        return names.result_key(task_id).encode() in self._waiting

    def _leave(self, channel: bytes) -> None:
        del self._waiting[channel]
        if channel not in self._channels and not self._fresh:
            return  # An expected outcome has no channel.
        self._left.append(channel)
        # The first channel starts the writer's timer; at LINGER_CHANNELS it stops lingering.
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
        fresh = list({s.channel for s in self._fresh if s.channel in self._waiting})
        joined = [channel for channel in fresh if channel not in self._channels]
        left = [c for c in set(self._left) if c in self._channels and c not in self._waiting]
        self._fresh, self._left = [], []
        self._channels.update(joined)
        self._channels.difference_update(left)
        if fresh:
            self._looked_up.append(fresh)
        commands = ((b"SUBSCRIBE", joined), (b"EXISTS", fresh), (b"UNSUBSCRIBE", left))
        return b"".join(_command(command, *channels) for command, channels in commands if channels)

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
                for reply in self._join(connection):
                    self._handle(reply)
            except Exception as exc:
                # Whatever the error was, everything still awaited is subscribed again.
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

    def _join(self, connection: AbstractConnection) -> Iterator[Any]:
        """Subscribe a new connection to all that is awaited, and return its replies."""
        # redis-py only opens the connection; its own readers would reconnect unnoticed.
        sock: socket.socket = connection._sock  # type: ignore[assignment]
        replies = _replies(sock)
        # Callers of `expect` rely on this subscription.
        sock.sendall(_command(b"SUBSCRIBE", self.reply_to.encode()))
        next(replies)
        # From here silence is normal; TCP keep-alive notices a Redis that is gone.
        sock.settimeout(None)
        with self._changed:
            self._socket = sock
            self._channels.clear()
            self._looked_up.clear()
            self._left = []
            self._fresh = [s for subscriptions in self._waiting.values() for s in subscriptions]
            self._changed.notify()
            if self._stopping.is_set():
                _abort(sock)
        return replies

    def _handle(self, reply: Any) -> None:
        match reply:
            case [b"message", bytes(channel), bytes(payload)]:
                self._announced(channel, payload)
            case int(count):
                # The answer to an EXISTS.
                with self._changed:
                    channels = self._looked_up.popleft()
                if count:
                    self._fetch(channels)

    def _announced(self, channel: bytes, payload: bytes) -> None:
        try:
            if channel.startswith(_CHANNEL_PREFIX):
                outcome = decode_outcome(payload)
                outcomes = [] if outcome is None else [outcome]
            else:
                outcomes = decode_outcomes(payload)
        except Exception:
            log.exception("The message on channel %r is not a result", channel)
            return
        for outcome in outcomes:
            self._deliver(outcome)

    def _fetch(self, channels: list[bytes]) -> None:
        task_ids = [channel.removeprefix(_CHANNEL_PREFIX).decode() for channel in channels]
        # Few at once: each result may have megabytes.
        for start in range(0, len(task_ids), self.FETCHED):
            some = task_ids[start : start + self.FETCHED]
            for outcome in self._records.outcomes(some).values():
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
                log.exception("The outcome of task %s could not be delivered", outcome.task_id)


def _replies(sock: socket.socket) -> Iterator[Any]:
    """Yield the replies and pushed messages of a connection.

    Raises:
      redis.ConnectionError: Redis has closed the connection.
      redis.ResponseError: Redis refused a command.
    """
    reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
    while True:
        while (reply := reader.gets()) is not _INCOMPLETE:
            if isinstance(reply, hiredis.ReplyError):
                raise redis.ResponseError(str(reply))
            yield reply
        data = sock.recv(_CHUNK)
        if not data:
            raise redis.ConnectionError("Redis has closed the connection")
        reader.feed(data)


def _command(*words: bytes) -> bytes:
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # Typed for one word.
    return packed


def _send(sock: socket.socket, commands: bytes) -> None:
    try:
        sock.sendall(commands)
    except OSError:
        _abort(sock)


def _abort(sock: socket.socket) -> None:
    # The reader, which may be blocked in `recv`, sees the end of the stream and reconnects.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
