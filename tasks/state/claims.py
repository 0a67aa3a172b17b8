"""Claims: large inputs have a key of their own, and the message has only their shapes.

    submit    the script that accepts a task writes its packed inputs
    batch     batches form by the shapes, so the event loop never reads large inputs
    forward   an executor fetches the inputs of a whole batch at once
    settle    the script that ends a task deletes the inputs, or keeps them for its dead letter

Only lanes on Redis Streams have claims. Messages of other Celery clients contain their inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np

from inferno.errors import InvalidInput
from inferno.protocol import packing
from inferno.protocol.tensors import MAX_DIMENSIONS, Tensors

#: The keyword argument that replaces `inputs` in a message: the shape of each input by its name.
ARGUMENT = "claim"

_Size = Annotated[int, msgspec.Meta(ge=1)]
_Shape = Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
_Shapes = Annotated[dict[str, _Shape], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Claim:
    """The inputs of a new task, stored under their own key."""

    key: str
    #: The inputs in the format of `inferno.protocol.packing`.
    payload: bytes = b""
    #: Key to copy the inputs from instead; "" when they are in `payload`.
    source: str = ""


def is_claim(kwargs: Mapping[str, Any]) -> bool:
    """Return whether a message has a claim instead of inputs, by its keyword arguments."""
    return ARGUMENT in kwargs and kwargs.get("inputs") is None


def shapes(inputs: Tensors) -> dict[str, list[int]]:
    """Return the shapes that a message has instead of its inputs."""
    return {name: list(array.shape) for name, array in inputs.items()}


def stand_ins(given: Any) -> Tensors:
    """Return arrays with the shapes that a message names; they take no memory.

    Raises:
      InvalidInput: the message names no valid shapes.
    """
    try:
        named = msgspec.convert(given, _Shapes)
        return {name: np.broadcast_to(np.uint8(0), shape) for name, shape in named.items()}
    except (msgspec.ValidationError, ValueError) as exc:
        raise InvalidInput(f"expected the shapes of inputs by name: {exc}", ARGUMENT) from None


def complete(kwargs: Mapping[str, Any], payload: bytes) -> dict[str, Any]:
    """Return the keyword arguments of a message, with the inputs in place of the claim."""
    rest = {name: value for name, value in kwargs.items() if name != ARGUMENT}
    return {"inputs": packing.in_json(payload)} | rest
