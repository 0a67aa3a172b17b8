"""What a client prefers: how long it wants to wait for its result (RFC 7240)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from inferno.errors import InvalidRequest

#: Longest wait that is granted, in seconds.
MAX_WAIT_S = 60.0

_WAIT = re.compile(r'\bwait\s*=\s*"?(\d{1,9})"?\s*(?:[,;]|$)', re.IGNORECASE)
_ASYNC = re.compile(r"\brespond-async\b", re.IGNORECASE)


@dataclass(frozen=True)
class Preference:
    """How long a call waits, and what of the client's preference was granted."""

    wait_s: float
    #: Value of `Preference-Applied`, or None when the client has no preference.
    applied: str | None = None


def prefer(header: str | None, default_s: float) -> Preference:
    """Read a `Prefer` header. What cannot be understood is ignored, as the standard demands.

    Args:
      header: its value, or None.
      default_s: the wait of clients that prefer nothing, in seconds.
    """
    if header is None:
        return Preference(default_s)
    if found := _WAIT.search(header):
        wait_s = min(float(found[1]), MAX_WAIT_S)
        return Preference(wait_s, f"wait={wait_s:.0f}")
    if _ASYNC.search(header):
        return Preference(0.0, "respond-async")
    return Preference(default_s)


def wait_parameter(value: str | None, default_s: float = 0.0, most_s: float = MAX_WAIT_S) -> float:
    """Read the `wait` parameter of a URL, in seconds.

    Raises:
      InvalidRequest: it is no number of seconds.
    """
    if value is None:
        return default_s
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        raise InvalidRequest(f"expected a number of seconds, got {value!r}", "wait")
    return min(float(value), most_s)
