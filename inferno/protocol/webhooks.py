"""Webhooks: the addresses that they may call, and their signatures.

The URL's form is checked when a task is submitted. The IP address is checked when the webhook is
delivered, because DNS may change in between. Signatures follow Standard Webhooks
(https://www.standardwebhooks.com), so its libraries verify them.
"""

from __future__ import annotations

import base64
import hmac
import re
import socket
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from inferno.errors import InvalidField
from inferno.protocol.internet import is_public

#: `type` of a webhook's message, by event.
EVENTS = {"start": "task.started", "completed": "task.completed"}
DEFAULT_EVENTS = ("completed",)

#: Maximum number of characters of a URL.
MAX_URL = 2048

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """The parts of a webhook's URL."""

    scheme: str
    #: Host name or IP address, without brackets.
    host: str
    port: int
    #: Path and query. They often hold a token and stay out of logs.
    target: str = field(repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Check the form of a webhook's URL.

    Raises:
      InvalidField: the URL is wrong. The message does not repeat it, because it may hold a secret.
    """
    if len(url) > MAX_URL:
        raise _refused(f"expected at most {MAX_URL} characters, got {len(url)}")
    # Parsers disagree about where the host ends if there is a backslash.
    if not re.fullmatch(r"[!-\[\]-~]*", url):
        raise _refused(
            "expected a URL of printable ASCII characters without spaces and backslashes"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused("expected a URL such as https://host.example/path") from None
    if parts.scheme not in ("http", "https"):
        raise _refused("expected a URL that begins with http:// or https://")
    if "@" in parts.netloc:
        raise _refused("expected a URL without a user name and password")
    host = parts.hostname
    if not host:
        raise _refused("expected a URL with a host, such as https://host.example/path")
    in_brackets = "[" in parts.netloc
    if not _is_host(host) or in_brackets != (":" in host) or port == 0:
        raise _refused("expected a host name or an IP address, and a port from 1 to 65535")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.scheme, host, port or {"http": 80, "https": 443}[parts.scheme], target)


def check_reach(url: str) -> None:
    """Refuse a URL with a private address as its host.

    Names are resolved and checked when the webhook is delivered.

    Raises:
      InvalidField: the host is `localhost` or an IP address that is not public.
    """
    host = parse_address(url).host
    name = host.rstrip(".")
    address = name if _is_literal(name) else _old_literal(name)
    if name == "localhost" or name.endswith(".localhost") or (address and not is_public(address)):
        raise _refused(
            f"expected a public address, got {host}; "
            "INFERNO_WEBHOOKS__ALLOW_PRIVATE=true allows private ones"
        )


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the `webhook-signature` of a message.

    Args:
      key: the decoded shared secret.
      message_id: `webhook-id` of the message.
      timestamp: `webhook-timestamp` of the message, in seconds since the epoch.
      body: the message's bytes.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()


def _refused(detail: str) -> InvalidField:
    return InvalidField(detail, "webhook")


def _is_host(host: str) -> bool:
    return _is_literal(host) or (len(host) <= 253 and _HOST_NAME.fullmatch(host) is not None)


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _old_literal(host: str) -> str | None:
    """Return the IP address that resolvers read in 127.1, 0x7f000001 or 2130706433."""
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None
