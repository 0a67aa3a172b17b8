"""The addresses of the platform, its Redis and its broker, as the settings name them."""

from __future__ import annotations

import socket
import ssl
from urllib.parse import unquote, urlsplit

from inferno.client import Client
from inferno.errors import ConfigurationError
from inferno.settings import RedisSettings, Settings, variable


def local_url(settings: Settings) -> str:
    """Return the URL at which this machine reaches the platform of these settings."""
    server = settings.server
    if server.certfile is not None and server.hosts[:1] not in ((), ("*",)):
        # Certificates are for names.
        return f"https://{server.hosts[0]}:{server.port}"
    return _listening_url(settings)


def local_client(settings: Settings) -> Client:
    """Return a client of this machine's own platform, at the address that it listens on.

    It needs no DNS, and verifies no certificate: that is for a public name, perhaps of an authority
    that this machine does not know, and the connection does not leave the machine.
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE
    return Client(_listening_url(settings), tls=tls)


def _listening_url(settings: Settings) -> str:
    server = settings.server
    host = server.host
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    return f"{'http' if server.certfile is None else 'https'}://{host}:{server.port}"


#: Default ports of brokers, by scheme.
_BROKER_PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379, "unix": 0}


def reach_redis(settings: RedisSettings) -> str:
    """Connect to the Redis server of the settings and return its address.

    Raises:
      ConfigurationError: the server cannot be reached.
    """
    return _reach(settings.url or "", 6379, settings.connect_timeout_s, variable("redis", "url"))


def reach_broker(settings: Settings) -> str | None:
    """Connect to the broker of the settings and return its address.

    Returns:
      Host and port; None for a broker that is unset or of an unknown kind.

    Raises:
      ConfigurationError: the broker cannot be reached.
    """
    port = _BROKER_PORTS.get(settings.broker.scheme)
    if settings.broker.url is None or port is None:
        return None
    timeout_s = settings.redis.connect_timeout_s
    return _reach(settings.broker.url, port, timeout_s, variable("broker", "url"))


def _reach(url: str, default_port: int, timeout_s: float, name: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return _reach_socket(unquote(parts.path), timeout_s, name)
    try:
        address = (parts.hostname or "127.0.0.1", parts.port or default_port)
        socket.create_connection(address, timeout=timeout_s).close()
    except (OSError, ValueError) as exc:
        # Do not show the URL, which may hold a password.
        raise ConfigurationError(f"{name}: {parts.hostname} cannot be reached: {exc}") from None
    return f"{address[0]}:{address[1]}"


def _reach_socket(path: str, timeout_s: float, name: str) -> str:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(timeout_s)
            probe.connect(path)
    except OSError as exc:
        raise ConfigurationError(f"{name}: {path} cannot be reached: {exc}") from None
    return path
