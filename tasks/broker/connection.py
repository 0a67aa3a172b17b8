"""Connections to Redis, and how its errors become ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferno.errors import BrokerUnavailable
from inferno.settings import Settings
from tasks.transport import consumer_name

#: What a Redis raises that is away, full or read-only, directly or through kombu.
UNAVAILABLE = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
    OperationalError,
)

#: Connections of one client at the same time.
MAX_CONNECTIONS = 64


def connect(settings: Settings) -> redis.Redis:
    """Return a client of the platform's Redis, with a pool of its own.

    Its connections bear this process' name as a consumer: each is a sign of its life.

    It does not retry by itself: a repeated write could be done twice, and a dead Redis shall be
    noticed at once.
    """
    # One that blocks: with hundreds of callers at once, the others wait for a connection instead of
    # failing.
    pool = redis.BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=MAX_CONNECTIONS,
        socket_connect_timeout=settings.redis.connect_timeout_s,
        socket_timeout=settings.redis.timeout_s,
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(NoBackoff(), 0),
        client_name=consumer_name(),
        protocol=2,
    )
    return redis.Redis.from_pool(pool)


@contextmanager
def translated() -> Iterator[None]:
    """Turn the errors of a Redis that cannot be used into `BrokerUnavailable`."""
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
        raise BrokerUnavailable(f"Redis takes no writes: {exc}") from exc


def never_sent(exc: Exception) -> bool:
    """Return whether a command failed before it left: there was no connection to send it by."""
    return isinstance(exc.__context__, ConnectionRefusedError | TimeoutError) and (
        "connecting" in str(exc)
    )


def is_refusal(exc: Exception) -> bool:
    """Return whether Redis refused a write for want of memory, or because it cannot save it.

    Redis 6 wraps what a script was refused in an error of the script's.
    """
    return re.search(r"(^|-)(MISCONF|OOM) ", str(exc)) is not None
