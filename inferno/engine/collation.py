"""Forward step: group members by length, pad them and stack them for the runtime."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from inferno.protocol.tensors import Array, Tensors
from inferno.repository.package import Package


class Collator:
    """Stacks the members of a forward pass of one version."""

    def __init__(self, package: Package, padding: Mapping[str, float | str]) -> None:
        """Store how tensors are padded.

        Args:
          package: the version.
          padding: fill value of each padded tensor that the processor returns. The package's own
            `batching.pad` takes precedence.
        """
        batching = package.manifest.batching
        self._buckets: Sequence[int] = batching.buckets
        self._batch_sizes: Sequence[int] = batching.batch_sizes
        #: Fill value of each padded tensor; masks are padded with 0.
        self._pad = {**dict.fromkeys(batching.mask.values(), 0), **padding, **batching.pad}
        #: For each padded input, positions of dimensions after the rows that have a declared size.
        self._fixed = {
            spec.name: {n for n, dim in enumerate(spec.shape[1:]) if isinstance(dim, int)}
            for spec in package.signature.inputs
            if spec.name in self._pad
        }

    @property
    def padded(self) -> frozenset[str]:
        """Names of the tensors that are padded."""
        return frozenset(self._pad)

    def groups(
        self, members: Sequence[Tensors], predict: Callable[[int, int], float]
    ) -> list[list[int]]:
        """Divide members into the passes that are predicted to be quickest together.

        Members of very different lengths are quicker apart, because each is padded to the longest
        member of its pass.

        Args:
          members: prepared inputs.
          predict: returns the seconds of a pass, given its rows and the length of its longest row.
        Returns:
          For each pass, the positions of its members.
        """
        places: dict[int, list[int]] = {}
        for place, member in enumerate(members):
            places.setdefault(self.length(member), []).append(place)
        if len(places) == 1:
            return [list(range(len(members)))]
        lengths = sorted(places)
        rows = [sum(count_rows(members[place]) for place in places[n]) for n in lengths]
        # Dynamic programming: the quickest time for the first n lengths, and the start of the last
        # pass of that solution.
        quickest, begins = [0.0], [0]
        for end, length in enumerate(lengths, start=1):
            together, best, begin = 0, math.inf, 0
            for first in range(end - 1, -1, -1):
                together += rows[first]
                seconds = quickest[first] + predict(together, length)
                # On a tie, fewer passes.
                if seconds <= best:
                    best, begin = seconds, first
            quickest.append(best)
            begins.append(begin)
        groups: list[list[int]] = []
        end = len(lengths)
        while end:
            groups.append([p for n in lengths[begins[end] : end] for p in places[n]])
            end = begins[end]
        return groups

    def length(self, member: Tensors) -> int:
        """Return the elements of one row of a member's largest padded tensor; 1 without padding."""
        return max(
            (
                math.prod(self._padded_shape(name, [member[name]], self._buckets))
                for name in self._pad
                if name in member
            ),
            default=1,
        )

    def lengthened(self, member: Tensors, size: int) -> Tensors:
        """Return a member whose padded dimensions have at least a size."""
        return {name: self._stack(name, [array], (size,)) for name, array in member.items()}

    def padded_rows(self, rows: int) -> int:
        """Return the rows of a pass after padding to a declared batch size."""
        return _next(rows, self._batch_sizes)

    def collate(self, members: Sequence[Tensors]) -> Tensors:
        """Stack the members of one pass, in order; padding rows come last."""
        if len(members) == 1 and not self._buckets and not self._batch_sizes:
            return members[0]
        stacked = {
            name: self._stack(name, [member[name] for member in members], self._buckets)
            for name in members[0]
        }
        rows = count_rows(stacked)
        missing = self.padded_rows(rows) - rows
        if missing > 0:
            # Copies of a real row are sure to be valid.
            stacked = {
                n: np.concatenate([a, a[-1:].repeat(missing, axis=0)]) for n, a in stacked.items()
            }
        return stacked

    def _padded_shape(
        self, name: str, arrays: Sequence[Array], sizes: Sequence[int]
    ) -> tuple[int, ...]:
        """Return the dimensions after the rows: the longest of each, free ones up to a size."""
        fixed = self._fixed.get(name, ())
        longest = map(max, zip(*(array.shape[1:] for array in arrays), strict=True))
        return tuple(n if place in fixed else _next(n, sizes) for place, n in enumerate(longest))

    def _stack(self, name: str, arrays: list[Array], sizes: Sequence[int]) -> Array:
        pad = self._pad.get(name)
        if pad is None:
            return np.concatenate(arrays)
        return _stack_padded(arrays, pad, self._padded_shape(name, arrays, sizes))


def count_rows(inputs: Tensors) -> int:
    """Return the rows of a task: the first dimension of its inputs."""
    first = next(iter(inputs.values()))
    return len(first) if first.ndim else 1


def chunks(inputs: Tensors, rows: int) -> Iterator[Tensors]:
    """Yield the inputs of a task in pieces of at most `rows` rows."""
    for start in range(0, count_rows(inputs), rows):
        yield {name: array[start : start + rows] for name, array in inputs.items()}


def _next(size: int, sizes: Sequence[int]) -> int:
    """Return the smallest listed size that is at least `size`; beyond the last one, `size`."""
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else size


def _stack_padded(arrays: list[Array], pad: float | str, longest: tuple[int, ...]) -> Array:
    if {array.shape[1:] for array in arrays} == {longest}:
        return np.concatenate(arrays)
    shape, dtype = (sum(map(len, arrays)), *longest), arrays[0].dtype
    # numpy's own text arrays are as wide as their longest text, so another one may not fit.
    dtype = np.dtype(object) if dtype.kind in "US" else dtype
    is_bytes = dtype.hasobject and any(isinstance(a.flat[0], bytes) for a in arrays if a.size)
    out = np.full(shape, str(pad).encode() if is_bytes else pad, dtype=dtype)
    start = 0
    for array in arrays:
        out[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
        start += len(array)
    return out
