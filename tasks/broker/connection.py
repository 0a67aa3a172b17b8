"""Connections to the platform's Redis, and the errors that they raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferno.errors import BrokerUnavailable
from inferno.settings import Settings
from tasks.transport import consumer_name
from tasks.transport.refusals import is_refusal

#: Errors of a Redis that is unreachable, full or read-only, raised directly or through kombu.
UNAVAILABLE = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
    OperationalError,
)

#: Maximum connections of one client.
MAX_CONNECTIONS = 64


def connect(settings: Settings) -> redis.Redis:
    """Return a client of the platform's Redis, with a connection pool of its own.

    Its connections bear this process's name as a consumer, so that others see that the process is
    alive. The client never retries: a repeated write could be done twice, and a dead Redis must be
    noticed at once.
    """
    # A blocking pool: with hundreds of callers, the last ones wait for a connection instead of
    # failing.
    # Unix sockets have no such option: the end of a process is noticed at once.
    is_tcp = not settings.redis_url.startswith("unix:")
    pool = redis.BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=MAX_CONNECTIONS,
        socket_connect_timeout=settings.redis.connect_timeout_s,
        socket_timeout=settings.redis.timeout_s,
        **({"socket_keepalive": True} if is_tcp else {}),
        health_check_interval=10,
        retry=Retry(NoBackoff(), 0),
        client_name=consumer_name(),
        protocol=2,
    )
    return redis.Redis.from_pool(pool)


@contextmanager
def translated() -> Iterator[None]:
    """Raise `BrokerUnavailable` in place of the errors of a Redis that cannot be used."""
    try:
        yield
    except UNAVAILABLE as exc:
        who = "the broker" if isinstance(exc, OperationalError) else "Redis"
        what = "is full" if isinstance(exc, redis.OutOfMemoryError) else "does not answer"
        raise BrokerUnavailable(
            f"{who} {what} ({type(exc).__name__}); try again in a moment"
        ) from exc
    except redis.ResponseError as exc:
        if not is_refusal(exc):
            raise
        # Redis adds which script was refused, which means nothing to clients.
        reason = str(exc).partition(" script: ")[0]
        raise BrokerUnavailable(f"Redis refuses writes: {reason}") from exc


def never_sent(exc: Exception) -> bool:
    """Return whether a command was never sent, because no connection could be made."""
    # A Unix socket of a server that was stopped is not there.
    unreachable = ConnectionRefusedError | FileNotFoundError | TimeoutError
    return isinstance(exc.__context__, unreachable) and "connecting" in str(exc)
