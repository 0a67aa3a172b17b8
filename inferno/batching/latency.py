"""How long a forward pass takes, as a function of its size: measured, and kept true by real passes.

The size of a pass is its rows or, where free dimensions are padded, its rows times what one row
holds after padding: a text model's time goes with its tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock


@dataclass(eq=False)
class Pass:
    """What one forward pass has taken by phases, in nanoseconds; one that fails ends early."""

    #: Of its members, without those that only pad.
    rows: int = 0
    #: Before the runtime has it: prepare and collate.
    input_ns: int = 0
    infer_ns: int = 0
    #: After that: postprocess, check, split, and the writing of results.
    output_ns: int = 0


class LatencyCurve:
    """Seconds by size: linear between measured sizes, and never falling.

    Safe to use from several threads.
    """

    #: Of a real pass, in what is predicted for its size.
    WEIGHT = 0.1
    #: A pass that took more times as long as predicted, or as short, counts as one that took so
    #: many times: one hiccup says little, a lasting change is believed after a few passes.
    CLIP = 2.0

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        """Begin with what has been measured: seconds by size."""
        #: Sizes and their seconds. Replaced as a whole, so that reading needs no lock.
        self._curve: tuple[list[int], list[float]] = ([], [])
        self._writing = Lock()
        for size, value in (seconds or {}).items():
            self.measured(size, value)

    @property
    def points(self) -> dict[int, float]:
        """Seconds by measured size."""
        return dict(zip(*self._curve, strict=True))

    def measured(self, size: int, seconds: float) -> None:
        """Take a reliable measurement, such as a median, for what it is."""
        with self._writing:
            self._set(size, seconds)

    def note(self, size: int, seconds: float) -> None:
        """Let a real pass correct what is predicted for its size, and for those near it."""
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
        """Return the seconds that a pass will probably take; 0 when nothing was ever measured."""
        sizes, seconds = self._curve
        above = bisect_right(sizes, size)
        if above == 0:
            return seconds[0] if seconds else 0.0
        left, value = sizes[above - 1], seconds[above - 1]
        if above < len(sizes):
            slope = (seconds[above] - value) / (sizes[above] - left)
        elif above > 1:
            # Two neighbours alone may be a little off.
            slope = (value - seconds[0]) / (left - sizes[0])
        else:
            slope = 0.0
        return value + slope * (size - left)

    def _set(self, size: int, seconds: float) -> None:
        """Set one point; where others would contradict that it never falls, the newest is right."""
        sizes, known = self._curve
        place = bisect_left(sizes, size)
        after = place + (sizes[place : place + 1] == [size])
        below = [min(value, seconds) for value in known[:place]]
        above = [max(value, seconds) for value in known[after:]]
        self._curve = ([*sizes[:place], size, *sizes[after:]], [*below, seconds, *above])
