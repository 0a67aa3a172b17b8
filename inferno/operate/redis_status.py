"""The state of a running Redis server, from its INFO and CONFIG commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from inferno.errors import ConfigurationError

if TYPE_CHECKING:
    from redis import Redis


class StatusHidden(ConfigurationError):
    """The server works, but its user may not ask for its state."""


@dataclass(frozen=True)
class RedisStatus:
    """State of one server at one moment."""

    #: Host and port, or the path of a Unix socket.
    address: str
    #: Fields of INFO.
    info: dict[str, str]
    #: `appendfsync` and `dir`; empty when the server does not allow CONFIG.
    config: dict[str, str]

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor number; Valkey reports the Redis version that it is compatible with."""
        major, minor = self.info["redis_version"].split(".")[:2]
        return int(major), int(minor)

    def number(self, field: str) -> int:
        """Return a numeric field of INFO; 0 if the server does not report it."""
        return int(self.info.get(field, 0))


def connect(url: str, timeout_s: float) -> Redis:
    """Return a client of a server; nothing is sent yet.

    Its INFO command returns the fields as strings.

    Args:
      url: ``redis://``, ``rediss://`` or ``unix://``, with user and password if the server needs
        them.
      timeout_s: time limit for connecting and for each command, in seconds.

    Raises:
      ValueError: the URL is malformed; the message may hold a part of its password.
    """
    # Imported here, so that commands such as `inferno --help` start without it.
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    # A server that is loading its data answers slowly, so a greeting (CLIENT SETINFO) only costs
    # time. Over TLS it is needed: without it, redis-py mistakes the session tickets that follow the
    # handshake for an unexpected reply.
    greeting: dict[str, Any] = {} if url.startswith("rediss:") else {"driver_info": None}
    client = Redis.from_url(
        url,
        socket_connect_timeout=timeout_s,
        socket_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
        encoding_errors="replace",
        # Servers older than 6 do not know RESP 3.
        protocol=2,
        **greeting,
    )
    # redis-py guesses types: a path with "=" in it would become a mapping.
    client.set_response_callback("INFO", _fields)
    return client


def redis_address(url: str) -> str:
    """Return host and port of a URL, or the path of its Unix socket.

    Raises:
      ValueError: the port is not a number; the message may hold a part of a password.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return unquote(parts.path)
    return f"{parts.hostname or '127.0.0.1'}:{parts.port or 6379}"


def ask(url: str, timeout_s: float) -> RedisStatus:
    """Ask a server for its state.

    Args:
      url: as for `connect`.
      timeout_s: time limit for connecting and for each command, in seconds.

    Raises:
      ConfigurationError: the server cannot be reached, refuses the password or is not a Redis
        server. The message does not contain the URL, which may hold a password.
      StatusHidden: the user of the URL may not run INFO.
    """
    from redis import InvalidResponse, RedisError
    from redis.exceptions import NoPermissionError

    try:
        address = redis_address(url)
    except ValueError:
        # The error's text may hold the beginning of a password that is not escaped.
        raise ConfigurationError(
            "the port is not a number, or a special character is not escaped"
        ) from None
    try:
        with connect(url, timeout_s) as client:
            info = client.info()
            config = _configuration(client)
    except InvalidResponse:
        raise ConfigurationError(
            f"{address} cannot be used: it does not answer as a Redis server does"
        ) from None
    except NoPermissionError:
        raise StatusHidden(f"{address} does not let this user run INFO") from None
    except (RedisError, OSError, ValueError) as exc:
        raise ConfigurationError(f"{address} cannot be used: {exc}") from None
    if "redis_version" not in info:
        raise ConfigurationError(f"{address} does not report its Redis version")
    return RedisStatus(address, info, config)


def _configuration(client: Redis) -> dict[str, str]:
    from redis import ResponseError

    config: dict[str, str] = {}
    try:
        for name in ("appendfsync", "dir"):
            if (value := client.config_get(name).get(name)) is not None:
                config[name] = value
    except ResponseError:
        return {}  # Hosted servers do not show their configuration.
    return config


def _fields(reply: str, **_: object) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in reply.splitlines() if ":" in line)
    return {name: value for name, value in pairs}
