"""Which calls of browsers are answered, and which pages may make them.

A browser calls whatever address a page names, and so reaches servers that only listen on this
machine. Headers that pages cannot set tell whose page makes a call:

- `Host` is the name by which the page knows the platform. Attackers can let names of their own
  resolve to this machine's address (DNS rebinding); their pages then have the platform's origin.
  So only the platform's own names are answered. IP addresses always are: nobody resolves them.
- `Origin` is the site of the page. Browsers send it with each call that can change something, and
  with each WebSocket handshake. It has to be the platform's own, or one that is allowed.

A third, `Sec-Fetch-Site`, also comes with pictures and scripts that a page includes. Their answers
would be withheld from the page, so they are refused at once. Links to the platform work.

Clients that are not browsers send no `Origin`. The type of a body decides nothing: `curl -d` sends
JSON as the type of forms, and what a page may send without asking first depends on the browser.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import ip_address

from inferno.errors import ForeignOrigin, Misdirected
from inferno.settings import variable

#: Methods that change nothing. Browsers send some of them without an `Origin`.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

#: Values of `Sec-Fetch-Site` for pages of other origins.
_FOREIGN = ("cross-site", "same-site")

#: A name or an IPv4 address, or an IPv6 address in brackets; then perhaps a port.
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::\d*)?", re.ASCII)

#: Number of host headers whose decision is kept.
_KEPT_HOSTS = 256


class BrowserRules:
    """Decides by the headers of a call whether it is answered."""

    def __init__(self, names: Iterable[str | None], origins: Iterable[str] = ()) -> None:
        """Store the platform's names and the allowed origins.

        Args:
          names: the platform's own, beside ``localhost``; ``*`` for any, None is ignored.
          origins: origins of other sites whose pages may call; ``*`` for any.
        """
        self._names = frozenset(name.lower() for name in ("localhost", *names) if name)
        self._origins = frozenset(origin.lower() for origin in origins)
        self._knows = lru_cache(_KEPT_HOSTS)(self._is_own)

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Return if a call is answered.

        Args:
          method: HTTP method.
          headers: values by lower-case name.
        Raises:
          Misdirected: the call is for another host.
          ForeignOrigin: a page of another site would change something, open a WebSocket or include
            the answer.
        """
        host = headers.get("host")
        if host is not None and not self._knows(host):
            raise Misdirected(
                f"{_name(host)!r} is not a name of this server; "
                f"if it is, add it to {variable('server', 'hosts')} and restart"
            )
        if method not in SAFE_METHODS or "upgrade" in headers or _includes(headers):
            self._check_page(headers, host)

    def allows(self, origin: str) -> bool:
        """Return whether pages of an origin may call as if they were the platform's own."""
        return origin.lower() in self._origins or "*" in self._origins

    @property
    def shares(self) -> bool:
        """Whether pages of any other site may call."""
        return bool(self._origins)

    def _check_page(self, headers: Mapping[str, str], host: str | None) -> None:
        origin = headers.get("origin")
        if origin is None:
            if headers.get("sec-fetch-site") not in _FOREIGN:
                return
            origin = "another site"
        elif self.allows(origin) or _site(origin) == (host or "").lower():
            return
        raise ForeignOrigin(
            f"a page of {origin} made this call; "
            f"add its origin to {variable('server', 'cors_origins')} to allow it"
        )

    def _is_own(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        address, name = found.groups()
        return "*" in self._names or _is_address(address or name) or name.lower() in self._names


def _name(host: str) -> str:
    """Return a `Host` without its port; a malformed one as it is."""
    found = _HOST.fullmatch(host)
    return host if found is None else found[1] or found[2]


def _includes(headers: Mapping[str, str]) -> bool:
    """Return whether a page of another site asks, other than by leading to this one."""
    return headers.get("sec-fetch-site") in _FOREIGN and headers.get("sec-fetch-mode") != "navigate"


def _site(origin: str) -> str | None:
    """Return the host and port of an origin of the web; None for others, such as ``null``."""
    scheme, separator, site = origin.lower().partition("://")
    return site if separator and scheme in ("http", "https") and site else None


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
