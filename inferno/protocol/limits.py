"""Limits of one request: the web tier checks them before it queues a task, workers check again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferno.settings import LimitSettings

#: Stands for "no limit".
_NONE = 2**62


@dataclass(frozen=True)
class Limits:
    """Largest sizes of one task and of its JSON; see `inferno.settings.LimitSettings`."""

    #: Maximum size of one text, in bytes of UTF-8.
    text_bytes: int = _NONE
    #: Maximum size of one decoded binary input, in bytes.
    image_bytes: int = _NONE
    #: Maximum number of rows in one task.
    rows: int = _NONE
    #: Maximum number of dimensions of a tensor.
    rank: int = _NONE
    #: Maximum number of elements in all tensors of one task.
    elements: int = _NONE
    #: Maximum number of texts and binary items in one task.
    items: int = _NONE
    #: Maximum size of all decoded inputs of one task, in bytes.
    input_bytes: int = _NONE
    #: Maximum number of pixels of one picture.
    image_pixels: int = _NONE
    #: Maximum number of pixels of all pictures of one task.
    total_pixels: int = _NONE
    #: Maximum depth of nested lists and objects in JSON.
    json_depth: int = _NONE
    #: Maximum number of values in JSON.
    json_values: int = _NONE
    #: Maximum number of members of all objects in JSON.
    json_members: int = _NONE

    @classmethod
    def of(cls, settings: LimitSettings) -> Limits:
        """Return the limits that the settings name."""
        return cls(
            text_bytes=settings.max_text_bytes,
            image_bytes=settings.max_image_bytes,
            rows=settings.max_rows,
            rank=settings.max_rank,
            elements=settings.max_elements,
            items=settings.max_items,
            input_bytes=settings.max_input_bytes,
            image_pixels=settings.max_image_pixels,
            total_pixels=settings.max_total_pixels,
            json_depth=settings.max_json_depth,
            json_values=settings.max_json_values,
            json_members=settings.max_json_members,
        )


#: No limits, for inputs that no client has sent, such as the samples of a package.
UNLIMITED = Limits()
