"""The parameters of lists: `limit` and `cursor`."""

from __future__ import annotations

import base64
import math
from typing import Any

from flask import request

from inferno.errors import InvalidRequest
from tasks.listing import Page, Place

#: Items of a page, by default and at most.
DEFAULT_LIMIT = 50
MAX_LIMIT = 500


def limit() -> int:
    """Return how many items the client wants.

    Raises:
      InvalidRequest: it is no number from 1 to `MAX_LIMIT`.
    """
    given = request.args.get("limit", str(DEFAULT_LIMIT))
    is_number = given.isascii() and given.isdigit() and len(given) < 10
    if not (is_number and 1 <= int(given) <= MAX_LIMIT):
        raise InvalidRequest(
            f"expected a whole number from 1 to {MAX_LIMIT}, got {given!r}", "limit"
        )
    return int(given)


def place() -> Place | None:
    """Return where the page begins; None at the beginning.

    Raises:
      InvalidRequest: the cursor is none that `cursor` has made.
    """
    given = request.args.get("cursor")
    if given is None:
        return None
    try:
        at, _, task_id = base64.urlsafe_b64decode(given).decode().partition(" ")
        found = Place(float(at), task_id)
    except ValueError:
        found = Place(math.nan, "")
    if not math.isfinite(found.at):
        raise InvalidRequest("expected the `next` of an earlier page", "cursor")
    return found


def cursor(page: Page[Any]) -> str | None:
    """Return the `cursor` of the page after this one; None at the end."""
    if page.last is None:
        return None
    return base64.urlsafe_b64encode(f"{page.last.at!r} {page.last.task_id}".encode()).decode()


def confirmed() -> int | None:
    """Return to how many the client says that something shall happen; None when it does not.

    Raises:
      InvalidRequest: it is no number.
    """
    given = request.args.get("confirm")
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise InvalidRequest(f"expected a whole number, got {given!r}", "confirm")
    return int(given)
