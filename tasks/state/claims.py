"""The claim check: large inputs are under a key of their own, and the message has their shapes.

    submit    the step that accepts a task writes its packed inputs
    batch     forms by the shapes, so that the event loop never reads what is large
    forward   an executor fetches the inputs of a whole batch at once
    settle    the step that ends a task deletes them, or keeps them for its dead letter

It is for lanes on Redis Streams; what other clients send has its inputs in the message.
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

#: The keyword argument that a message has instead of `inputs`: the shape of each by its name.
ARGUMENT = "claim"

_Size = Annotated[int, msgspec.Meta(ge=1)]
_Shape = Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
_Shapes = Annotated[dict[str, _Shape], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Claim:
    """Inputs of a new task, as `inferno.protocol.packing`."""

    #: Where they are kept.
    key: str
    payload: bytes = b""
    #: The key that they are copied from; "" when they are the payload.
    source: str = ""


def is_claim(kwargs: Mapping[str, Any]) -> bool:
    """Return whether the inputs of a message are not in it, by its keyword arguments."""
    return ARGUMENT in kwargs and kwargs.get("inputs") is None


def shapes(inputs: Tensors) -> dict[str, list[int]]:
    """Return what the message of a task says of its claimed inputs."""
    return {name: list(array.shape) for name, array in inputs.items()}


def stand_ins(given: Any) -> Tensors:
    """Return arrays of the shapes that a message names, which take no memory.

    Raises:
      InvalidInput: it names none.
    """
    try:
        named = msgspec.convert(given, _Shapes)
        return {name: np.broadcast_to(np.uint8(0), shape) for name, shape in named.items()}
    except (msgspec.ValidationError, ValueError) as exc:
        raise InvalidInput(f"expected the shapes of inputs by name: {exc}", ARGUMENT) from None


def complete(kwargs: Mapping[str, Any], payload: bytes) -> dict[str, Any]:
    """Return the keyword arguments of a message with its claimed inputs in their place."""
    rest = {name: value for name, value in kwargs.items() if name != ARGUMENT}
    return {"inputs": packing.in_json(payload)} | rest
