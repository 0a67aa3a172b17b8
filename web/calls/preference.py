"""How long a client prefers to wait for its result (RFC 7240)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from web.openapi.describe import Header

#: Longest wait that is granted, in seconds.
MAX_WAIT_S = 60.0

_WAIT = re.compile(r'\bwait\s*=\s*"?(\d{1,9})"?\s*(?:[,;]|$)', re.IGNORECASE)
_ASYNC = re.compile(r"\brespond-async\b", re.IGNORECASE)


PREFER = Header(
    "Prefer",
    "`wait=<seconds>`, at most 60, or `respond-async` (RFC 7240).",
    example="wait=30",
)
PREFERENCE_APPLIED = Header(
    "Preference-Applied", "The part of `Prefer` that was granted.", example="wait=30"
)


class Wait(msgspec.Struct):
    """Parameter of a call that can wait for the end of a task."""

    wait: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(
            description="How long to wait for the end of the task, in seconds; at most 60.",
            examples=[30],
        ),
    ] = None


@dataclass(frozen=True)
class Preference:
    """How long a call waits, and which preference of the client was granted."""

    wait_s: float
    #: Value of `Preference-Applied`; None if the client has no preference.
    applied: str | None = None


def prefer(header: str | None, default_s: float) -> Preference:
    """Read a `Prefer` header; unknown preferences are ignored, as the standard requires.

    Args:
      header: value of the header, or None.
      default_s: wait without a preference, in seconds.
    """
    if header is None:
        return Preference(default_s)
    if found := _WAIT.search(header):
        wait_s = min(float(found[1]), MAX_WAIT_S)
        return Preference(wait_s, f"wait={wait_s:.0f}")
    if _ASYNC.search(header):
        return Preference(0.0, "respond-async")
    return Preference(default_s)


def granted_s(wait: float | None, default_s: float = 0.0, most_s: float = MAX_WAIT_S) -> float:
    """Return how long a call with this `wait` parameter may wait, in seconds."""
    return default_s if wait is None else min(wait, most_s)
