"""A draft of a package: everything that its artifact tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferno.errors import PackageError
from inferno.protocol import tensors

#: Size of a fixed dimension, name of a free one, or None for a free one without a name.
Dimension = int | str | None


@dataclass(frozen=True)
class Tensor:
    """One input or output, possibly incomplete."""

    name: str
    dtype: str
    #: None if even the number of dimensions is unknown.
    shape: tuple[Dimension, ...] | None
    optional: bool = False


@dataclass
class Draft:
    """The contents of a package to be."""

    #: Name of the artifact, for messages.
    source: str
    format: str
    #: Files to copy, by their path in the version's folder.
    files: dict[str, Path]
    inputs: list[Tensor]
    #: Outputs without a shape, and all outputs of an empty list, are found in a trial run.
    outputs: list[Tensor]
    artifact: str | None = None
    entrypoint: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    #: Messages for the owner.
    notes: list[str] = field(default_factory=list)
    #: Number of rows, if the artifact accepts no other number.
    fixed_rows: int | None = None


def parse_tensor(text: str) -> Tensor:
    """Parse ``name:dtype:shape``, such as ``x:float32:batch,3,224``.

    Raises:
      ValueError: the text has another form; the message tells what is expected.
    """
    # Names of tensors may contain colons, as in TensorFlow.
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
    """Replace an artifact's tensors by the owner's descriptions of them.

    Args:
      source: the artifact, for messages.
      found: tensors of the artifact.
      given: tensors that the owner describes.
      kind: `input` or `output`.
    Raises:
      PackageError: the artifact has no tensor of a given name.
    """
    described = {tensor.name: tensor for tensor in given}
    unknown = described.keys() - {tensor.name for tensor in found}
    if unknown:
        names = ", ".join(tensor.name for tensor in found)
        raise PackageError(f"{source}: has no {kind} {', '.join(sorted(unknown))}; it has {names}")
    return [described.get(tensor.name, tensor) for tensor in found]
