"""Forward step: check what a model returned, and split it among the members of the pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from inferno.errors import ForwardFailed
from inferno.protocol.signature import TensorSpec
from inferno.protocol.tensors import NUMERIC, Array, Tensors
from inferno.repository.package import Package


class OutputSplitter:
    """Checks and splits the outputs of one version."""

    def __init__(self, package: Package, padded: Collection[str]) -> None:
        """Store the declared outputs.

        Args:
          package: the version.
          padded: names of the tensors that are padded.
        """
        self._signature = package.signature
        self._padded = [spec for spec in package.signature.inputs if spec.name in padded]
        dimensions = {dim for spec in self._padded for dim in spec.shape[1:]}
        #: Outputs that share dimensions with padded inputs.
        self._cut = [s for s in package.signature.outputs if dimensions & {*s.shape[1:]}]

    def split(
        self, outputs: Any, members: Sequence[Tensors], rows: Sequence[int], padded_rows: int
    ) -> list[Tensors]:
        """Return the declared outputs of each member.

        Args:
          outputs: what the model returned, after postprocessing.
          members: prepared inputs.
          rows: rows of each member.
          padded_rows: rows of the pass; those beyond the members' rows are padding.
        Raises:
          ForwardFailed: the outputs do not match the signature or the number of rows.
        """
        if not isinstance(outputs, dict):
            raise ForwardFailed(
                f"the model returned {type(outputs).__name__}, expected outputs by name"
            )
        checked = self._check(outputs, padded_rows)
        if not self._signature.batched:
            return [checked]
        ends = np.cumsum(rows).tolist()
        answers = [
            {name: array[end - n : end] for name, array in checked.items()}
            for end, n in zip(ends, rows, strict=True)
        ]
        if self._cut:
            for member, answer in zip(members, answers, strict=True):
                self._cut_padding(member, answer)
        return answers

    def _check(self, outputs: Tensors, rows: int) -> Tensors:
        checked = {}
        for spec in self._signature.outputs:
            array = outputs.get(spec.name)
            if array is None:
                if spec.optional:
                    continue
                given = ", ".join(outputs) or "none"
                raise ForwardFailed(
                    f"the model returned no output {spec.name!r}; it returned {given}"
                )
            checked[spec.name] = _conform(array, spec, rows)
        return checked

    def _cut_padding(self, member: Tensors, answer: Tensors) -> None:
        """Cut dimensions that an answer shares with its member's inputs to the inputs' size."""
        sizes = {
            dim: size
            for spec in self._padded
            if spec.name in member and member[spec.name].ndim == len(spec.shape)
            for dim, size in zip(spec.shape[1:], member[spec.name].shape[1:], strict=True)
        }
        for spec in self._cut:
            if spec.name in answer:
                own = (slice(sizes.get(dim)) for dim in spec.shape[1:])
                answer[spec.name] = answer[spec.name][(slice(None), *own)]


def _conform(output: Any, spec: TensorSpec, rows: int) -> Array:
    array: Array = np.asarray(output)
    if spec.batched and (array.ndim == 0 or len(array) != rows):
        got = len(array) if array.ndim else "a scalar"
        raise ForwardFailed(f"output {spec.name!r} has {got} rows for {rows} rows of input")
    if array.ndim != len(spec.shape) or any(
        isinstance(dim, int) and dim != size
        for dim, size in zip(spec.shape, array.shape, strict=True)
    ):
        raise ForwardFailed(
            f"output {spec.name!r} has shape {list(array.shape)}, declared is {list(spec.shape)}"
        )
    if spec.dtype in NUMERIC:
        return _numeric(array, spec)
    # numpy's own text and bytes arrays, or Python's strings and bytes as objects.
    kind, element = ("U", str) if spec.dtype == "string" else ("S", bytes)
    if array.dtype.kind != kind and not all(isinstance(item, element) for item in array.flat):
        raise ForwardFailed(f"output {spec.name!r} holds {array.dtype}, declared is {spec.dtype}")
    return array


def _numeric(array: Array, spec: TensorSpec) -> Array:
    if array.dtype.kind not in "biuf":
        raise ForwardFailed(
            f"output {spec.name!r} has dtype {array.dtype}, declared is {spec.dtype}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(NUMERIC[spec.dtype], copy=False)
    if converted.dtype.kind == "f":
        if not np.isfinite(converted).all():
            raise ForwardFailed(f"output {spec.name!r} holds NaN or infinity")
    elif converted.dtype != array.dtype and not np.array_equal(converted, array):
        raise ForwardFailed(
            f"output {spec.name!r} has {array.dtype} values that do not fit {spec.dtype}"
        )
    return converted
