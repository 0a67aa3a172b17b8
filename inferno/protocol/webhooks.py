"""Webhooks: where they may go, and how they are signed.

The form of an address is checked when a task is submitted, the machine behind it when the webhook
is delivered: what a name leads to may change in between. Signatures are those of Standard Webhooks
(https://www.standardwebhooks.com), so that its libraries verify them.
"""

from __future__ import annotations

import base64
import hmac
import re
import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from inferno.errors import InvalidField

#: What a webhook can be told of, and the `type` of its message.
EVENTS = {"start": "task.started", "completed": "task.completed"}
DEFAULT_EVENTS = ("completed",)

#: Most characters of an address.
MAX_URL = 2048

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.IGNORECASE)

#: Addresses of IPv4 hosts in networks that have IPv6 alone (RFC 6052).
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Address:
    """Where a webhook goes, taken apart."""

    scheme: str
    #: A name or an IP address, without brackets.
    host: str
    port: int
    #: Path and query. They often hold a token, and so do not appear in logs.
    target: str = field(repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Check the form of a webhook's URL.

    Raises:
      InvalidField: says what is expected; it does not repeat the URL, which may hold a secret.
    """
    if len(url) > MAX_URL:
        raise _refused(f"expected at most {MAX_URL} characters, got {len(url)}")
    # Parsers disagree on where a host ends when there is a backslash.
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
    """Refuse a URL that says by itself that it leads to a private address.

    Names are looked up when the webhook is delivered, and refused then.

    Raises:
      InvalidField: the host is an IP address that is not public, or `localhost`.
    """
    host = parse_address(url).host
    name = host.rstrip(".")
    address = name if _is_literal(name) else _old_literal(name)
    if name == "localhost" or name.endswith(".localhost") or (address and not is_public(address)):
        raise _refused(
            f"expected a public address, got {host}; "
            "INFERNO_WEBHOOKS__ALLOW_PRIVATE=true allows private ones"
        )


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet.

    Loopback, private, shared, link-local, multicast, reserved and unspecified addresses do not; an
    IPv6 address that stands for an IPv4 one is as public as that.
    """
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in _NAT64:
            embedded = IPv4Address(int(parsed) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if parsed.is_site_local:
            return False
    return parsed.is_global and not (
        parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified
    )


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the `webhook-signature` of a message.

    Args:
      key: the shared secret, decoded.
      message_id: its `webhook-id`.
      timestamp: its `webhook-timestamp`, in seconds since the epoch.
      body: as it is sent.
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
    """Return the address that resolvers see in 127.1, 0x7f000001 and 2130706433."""
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None
