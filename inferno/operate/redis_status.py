"""What a running Redis tells of itself, asked over a plain socket without a Redis client."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from io import BufferedRWPair
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from inferno.errors import ConfigurationError


@dataclass(frozen=True)
class RedisStatus:
    """The answers of one server, at one moment."""

    #: Host and port.
    address: str
    #: The fields of INFO.
    info: dict[str, str]
    #: What CONFIG GET told; empty where the server does not let us ask.
    config: dict[str, str]

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor number; that of Valkey is the Redis that it is compatible with."""
        major, minor = self.info["redis_version"].split(".")[:2]
        return int(major), int(minor)

    def number(self, field: str) -> int:
        """Return a field of INFO that counts something, 0 where the server does not have it."""
        return int(self.info.get(field, 0))


class _Refused(Exception):
    """The server answers a command with an error."""


def ask(url: str, timeout_s: float) -> RedisStatus:
    """Ask the server of a URL, ``redis://`` or ``rediss://``.

    Args:
      url: with user and password, where it needs them.
      timeout_s: for connecting, and for each answer.

    Raises:
      ConfigurationError: it cannot be reached, does not let us in or is no Redis. The message
        does not hold the URL, which may hold a password.
    """
    parts = urlsplit(url)
    try:
        address = (parts.hostname or "127.0.0.1", parts.port or 6379)
    except ValueError:
        # Its text may hold the beginning of a password that is not escaped.
        raise ConfigurationError("the port is no number, or a character is not escaped") from None
    try:
        with socket.create_connection(address, timeout=timeout_s) as plain:
            connection = _secured(plain, parts) if parts.scheme == "rediss" else plain
            with connection, connection.makefile("rwb") as stream:
                _log_in(stream, parts)
                info = _fields(_call(stream, "INFO"))
                config = _configuration(stream)
    except (OSError, ValueError, _Refused) as exc:
        raise ConfigurationError(f"{address[0]}:{address[1]} cannot be used: {exc}") from None
    if "redis_version" not in info:
        raise ConfigurationError(f"{address[0]}:{address[1]} does not tell which Redis it is")
    return RedisStatus(f"{address[0]}:{address[1]}", info, config)


def _secured(plain: socket.socket, parts: SplitResult) -> ssl.SSLSocket:
    # The same options in the URL as redis-py knows them.
    options = parse_qs(parts.query)
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs", [None])[0])
    if options.get("ssl_cert_reqs", ["required"])[0].lower().removeprefix("cert_") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(plain, server_hostname=parts.hostname)


def _log_in(stream: BufferedRWPair, parts: SplitResult) -> None:
    if parts.password:
        user = [unquote(parts.username)] if parts.username else []
        _call(stream, "AUTH", *user, unquote(parts.password))


def _configuration(stream: BufferedRWPair) -> dict[str, str]:
    try:
        told = [_call(stream, "CONFIG", "GET", name) for name in ("appendfsync", "dir")]
    except _Refused:
        return {}  # Hosted servers keep their configuration to themselves.
    return dict(pair for pair in told if len(pair) == 2)


def _fields(reply: list[str]) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in reply[0].splitlines() if ":" in line)
    return {name: value for name, value in pairs}


def _call(stream: BufferedRWPair, *words: str) -> list[str]:
    """Send a command and return its reply: the items of an array, or one."""
    encoded = [word.encode() for word in words]
    stream.write(b"*%d\r\n" % len(encoded))
    stream.writelines(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
    stream.flush()
    head = stream.readline().decode().rstrip("\r\n")
    if head.startswith("*"):
        return [_text(stream, stream.readline().decode()) for _ in range(int(head[1:]))]
    return [_text(stream, head)]


def _text(stream: BufferedRWPair, head: str) -> str:
    if head.startswith("-"):
        raise _Refused(head[1:].strip())
    if head.startswith("$"):
        return stream.read(int(head[1:]) + 2)[:-2].decode(errors="replace")
    if not head.startswith("+"):
        raise ValueError("it does not answer as a Redis does")
    return head[1:].strip()
