"""What the package of an artifact will say, as far as the artifact tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferno.errors import PackageError
from inferno.protocol import tensors

#: A size; the name of a free one; None for a free one without a name.
Dimension = int | str | None


@dataclass(frozen=True)
class Tensor:
    """One input or output, as far as it is known."""

    name: str
    dtype: str
    #: None where not even the number of dimensions is known.
    shape: tuple[Dimension, ...] | None
    optional: bool = False


@dataclass
class Draft:
    """What a package will be made of."""

    #: What it is made from, for messages.
    source: str
    format: str
    #: By the path that each gets in the version's folder.
    files: dict[str, Path]
    inputs: list[Tensor]
    #: Those without a shape, and all if there are none, are found by running it.
    outputs: list[Tensor]
    artifact: str | None = None
    entrypoint: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    #: What its owner should know of it.
    notes: list[str] = field(default_factory=list)
    #: The number of rows that the artifact takes, where it takes no other.
    fixed_rows: int | None = None


def parse_tensor(text: str) -> Tensor:
    """Read what people say of a tensor: ``name:dtype:shape``, such as ``x:float32:batch,3,224``.

    Raises:
      ValueError: it is not of this form; says what was expected.
    """
    # The names of tensors may have colons, as TensorFlow's do.
    name, dtype, shape = [*text.rsplit(":", 2), "", ""][:3]
    if not name or not dtype or text.count(":") < 2:
        raise ValueError(f"{text!r}: expected name:dtype:shape, such as x:float32:batch,3")
    known = tensors.dtype_name(dtype)
    if known is None:
        raise ValueError(f"{text!r}: {dtype}: expected one of {', '.join(tensors.DTYPES)}")
    dims = [dim.strip() for dim in shape.strip("[] ").split(",") if dim.strip()]
    return Tensor(name, known, tuple(int(dim) if dim.isdecimal() else dim for dim in dims))


def named(
    source: object, found: Sequence[Tensor], given: Sequence[Tensor], kind: str
) -> list[Tensor]:
    """Put what the owner says in the place of what was found.

    Args:
      source: what was read.
      found: the tensors that it has.
      given: what the owner says of them.
      kind: `input` or `output`.
    Raises:
      PackageError: the owner speaks of one that there is not.
    """
    said = {tensor.name: tensor for tensor in given}
    unknown = said.keys() - {tensor.name for tensor in found}
    if unknown:
        names = ", ".join(tensor.name for tensor in found)
        raise PackageError(f"{source}: has no {kind} {', '.join(sorted(unknown))}; it has {names}")
    return [said.get(tensor.name, tensor) for tensor in found]
