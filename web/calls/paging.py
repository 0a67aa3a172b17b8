"""The parameters of lists, `limit` and `cursor`, and of what happens to many: `confirm`."""

from __future__ import annotations

import base64
import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from inferno.errors import InvalidRequest
from tasks.state.listing import Page, Place

#: Items of a page, by default and at most.
DEFAULT_LIMIT = 50
MAX_LIMIT = 500


Next = Annotated[str | None, Meta(description="The `cursor` of the next page; null at the end.")]


class Paged(msgspec.Struct):
    """The parameters of a list."""

    model: Annotated[str | None, Meta(description="Only of this model.")] = None
    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT, description="Items of a page.")] = DEFAULT_LIMIT
    cursor: Annotated[str | None, Meta(description="`next` of the page before.")] = None


class Confirmed(msgspec.Struct):
    """The parameters of what happens to many at once."""

    confirm: Annotated[
        Annotated[int, Meta(ge=0, le=999_999_999)] | None,
        Meta(description="To how many it shall happen; nothing does if there are more or fewer."),
    ] = None


def place(given: str | None) -> Place | None:
    """Return where the page of a cursor begins; None at the beginning.

    Raises:
      InvalidRequest: the cursor is none that `cursor` has made.
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
    """Return the `cursor` of the page after this one; None at the end."""
    if page.last is None:
        return None
    return base64.urlsafe_b64encode(f"{page.last.at!r} {page.last.task_id}".encode()).decode()
