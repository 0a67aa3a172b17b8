"""Parameters of lists (`limit`, `cursor`) and of operations on many items (`confirm`)."""

from __future__ import annotations

import base64
import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from inferno.errors import InvalidRequest
from tasks.state.listing import Page, Place

#: Number of items in a page: default and maximum.
DEFAULT_LIMIT = 50
MAX_LIMIT = 500


Next = Annotated[str | None, Meta(description="`cursor` of the next page; null on the last one.")]


class Paged(msgspec.Struct):
    """Parameters of a list."""

    model: Annotated[str | None, Meta(description="Only this model.")] = None
    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT, description="Number of items in a page.")] = (
        DEFAULT_LIMIT
    )
    cursor: Annotated[str | None, Meta(description="`next` of the previous page.")] = None


class Confirmed(msgspec.Struct):
    """Parameters of an operation on many items."""

    confirm: Annotated[
        Annotated[int, Meta(ge=0, le=999_999_999)] | None,
        Meta(description="Expected number of items; nothing happens if there are more or fewer."),
    ] = None


def place(given: str | None) -> Place | None:
    """Return where the page of a cursor begins; None for the first page.

    Raises:
      InvalidRequest: the text is not a cursor.
    """
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
    """Return the `cursor` of the next page; None for the last page."""
    if page.last is None:
        return None
    return base64.urlsafe_b64encode(f"{page.last.at!r} {page.last.task_id}".encode()).decode()
