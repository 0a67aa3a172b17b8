"""The style of the plots. Only this module and `drawings` import matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

#: Okabe and Ito's palette, which colour-blind people can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
ORANGE, PURPLE, SKY, GREY = "#E69F00", "#CC79A7", "#56B4E9", "#6b6b6b"

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "savefig.facecolor": "white",
    # Keep text as text, and give equal files for equal figures.
    "svg.fonttype": "none",
    "svg.hashsalt": "inferno",
    "xtick.color": "#555555",
    "xtick.labelsize": 8,
    "ytick.color": "#555555",
    "ytick.labelsize": 8,
}
#: Steps of a curve along the time axis: more would enlarge the file without a better picture.
_STEPS = 300
#: Height of the two lines above the axes, in inches.
_HEAD_IN = 0.62


def save(
    files: Sequence[Path],
    question: str,
    finding: str,
    draw: Callable[[Figure], None],
    height_in: float,
) -> None:
    """Draw a figure and save it.

    Args:
      files: files to write; the suffix, such as ``.svg``, is the format.
      question: first line of text.
      finding: second line of text, in bold.
      draw: adds the axes to the figure.
      height_in: height of the figure, in inches.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.0, height_in), layout="constrained")
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)
        engine.set(rect=(0, 0, 1, 1 - _HEAD_IN / height_in), h_pad=0.06)
        for text, from_top_in, size, colour, weight in (
            (question, 0.14, 9.5, "#555555", "normal"),
            (finding, 0.34, 12.5, "#111111", "bold"),
        ):
            figure.text(
                0.012,
                1 - from_top_in / height_in,
                text,
                va="top",
                color=colour,
                fontsize=size,
                fontweight=weight,
            )
        draw(figure)
        for file in files:
            is_svg = file.suffix == ".svg"
            figure.savefig(file, dpi=160, metadata={"Date": None} if is_svg else None)
            if is_svg:
                # Hundredths of a point are precise enough, and halve the file.
                file.write_text(re.sub(r"(\.\d\d)\d+", r"\1", file.read_text()))


def label(
    axes: Axes,
    at: tuple[float, float],
    text: str,
    colour: str,
    offset: tuple[float, float] = (4, 4),
) -> None:
    """Write a label beside a point.

    Args:
      axes: axes to write on.
      at: position of the point, in the axes' units.
      text: text of the label.
      colour: colour of the label.
      offset: offset from the point, in typographic points; the text extends in its direction.
    """
    right, up = offset
    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        color=colour,
        fontsize=9,
        fontweight="bold",
        ha="left" if right > 0 else "right" if right < 0 else "center",
        va="bottom" if up > 0 else "top" if up < 0 else "center",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.8},
    )


def cumulative(axes: Axes, times_s: Sequence[float], colour: str) -> None:
    """Draw the number of events up to each time."""
    edges = np.linspace(0, max(times_s), _STEPS)
    axes.plot(edges, np.searchsorted(np.sort(times_s), edges, side="right"), color=colour)
