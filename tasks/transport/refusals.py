"""The errors with which Redis refuses writes for a while."""

from __future__ import annotations

import re

import redis

#: How such an error begins. Redis 6 puts the error of a command inside an error of the script.
_REFUSAL = re.compile(r"(^|-)(OOM|MISCONF|READONLY|NOREPLICAS|MASTERDOWN|BUSY|LOADING) ")


def is_refusal(exc: Exception) -> bool:
    """Return whether Redis refuses writes for now: it is full, read-only, busy or cannot save."""
    # redis-py has classes for some of these errors, and cuts off how they begin.
    refused = isinstance(exc, redis.OutOfMemoryError | redis.ReadOnlyError)
    return refused or _REFUSAL.search(str(exc)) is not None
