"""Forward step: the time of a pass by its size, measured at warm-up, corrected by real passes.

The size of a pass is its number of rows. Where free dimensions are padded, it is the number of rows
times the elements of one padded row, because the time of a text model grows with its tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock


@dataclass(eq=False)
class Pass:
    """Times of one forward pass by phase, in nanoseconds; later phases are 0 if it failed."""

    #: Rows of its members, without padding rows.
    rows: int = 0
    #: Before the runtime: prepare and collate.
    input_ns: int = 0
    #: In the runtime.
    infer_ns: int = 0
    #: After the runtime: postprocess, check, split, and write results.
    output_ns: int = 0


class LatencyCurve:
    """Seconds by size: linear between measured sizes, and never falling; thread-safe."""

    #: Weight of a real pass in the prediction for its size.
    WEIGHT = 0.1
    #: Largest ratio of measured to predicted time that counts, and the inverse of the smallest.
    #: So one outlier changes little, and a lasting change is learned within a few passes.
    CLIP = 2.0

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        """Start with measured seconds by size."""
        #: Sizes and their seconds. Replaced as a whole, so that readers need no lock.
        self._curve: tuple[list[int], list[float]] = ([], [])
        self._writing = Lock()
        for size, value in (seconds or {}).items():
            self.measured(size, value)

    @property
    def points(self) -> dict[int, float]:
        """Seconds by measured size."""
        return dict(zip(*self._curve, strict=True))

    def measured(self, size: int, seconds: float) -> None:
        """Set a point to a reliable measurement, such as a median."""
        with self._writing:
            self._set(size, seconds)

    def note(self, size: int, seconds: float) -> None:
        """Correct the points around `size` by the time of a real pass."""
        with self._writing:
            sizes, known = self._curve
            if not sizes or size >= 2 * sizes[-1]:
                self._set(size, seconds)
                return
            predicted = self.predict(size)
            ratio = min(max(seconds / predicted, 1 / self.CLIP), self.CLIP) if predicted else 1.0
            above = min(bisect_left(sizes, size), len(sizes) - 1)
            share = 1.0
            if above > 0 and size < sizes[above]:
                share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
            for place, part in ((above - 1, 1 - share), (above, share)):
                if part:
                    changed = known[place] * (1 + self.WEIGHT * part * (ratio - 1))
                    self._set(sizes[place], changed)

    def predict(self, size: int) -> float:
        """Return the predicted seconds of a pass; 0 if nothing was ever measured."""
        sizes, seconds = self._curve
        above = bisect_right(sizes, size)
        if above == 0:
            return seconds[0] if seconds else 0.0
        left, value = sizes[above - 1], seconds[above - 1]
        if above < len(sizes):
            slope = (seconds[above] - value) / (sizes[above] - left)
        elif above > 1:
            # The slope between the last two points alone is noisy.
            slope = (value - seconds[0]) / (left - sizes[0])
        else:
            slope = 0.0
        return value + slope * (size - left)

    def _set(self, size: int, seconds: float) -> None:
        """Set one point, and move the others so that the curve never falls."""
        sizes, known = self._curve
        place = bisect_left(sizes, size)
        after = place + (sizes[place : place + 1] == [size])
        below = [min(value, seconds) for value in known[:place]]
        above = [max(value, seconds) for value in known[after:]]
        self._curve = ([*sizes[:place], size, *sizes[after:]], [*below, seconds, *above])
