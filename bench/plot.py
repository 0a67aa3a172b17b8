"""Draw a run: `python -m bench.plot RESULTS.json` writes RESULTS.svg and RESULTS.png.

It runs in its own environment, which has matplotlib and little else.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Inferno stands out; labels distinguish the others.
OWN, OTHER, RANGE = "#d9480f", "#868e96", "#343a40"


def main(path: Path) -> None:
    """Draw a results file, and save the plots beside it."""
    document = json.loads(path.read_text())
    bars = _bars(document["measurements"])
    if not bars:
        sys.exit(f"{path} has no closed loop over HTTP.")
    workloads = list(dict.fromkeys(workload for workload, _ in bars))
    scenarios = list(dict.fromkeys(scenario for _, scenario in bars))
    figure, axes = plt.subplots(
        len(workloads),
        len(scenarios),
        squeeze=False,
        figsize=(4.5 * len(scenarios), 0.9 + 2.8 * len(workloads)),
        layout="constrained",
    )
    for row, workload in zip(axes, workloads, strict=True):
        for axis, scenario in zip(row, scenarios, strict=True):
            _draw(axis, bars.get((workload, scenario), {}), f"{workload}, {scenario}")
    machine = document["machine"]
    figure.suptitle(
        f"Answers a second (median and range), commit {machine['commit']}, "
        f"{machine['cores']} cores of {machine['cpu']}",
        fontsize=9,
    )
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=120)
        print(path.with_suffix(suffix))


def _bars(measurements: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Return the rates of the repeats by target, for each workload and scenario."""
    bars: dict[tuple[str, str], dict[str, list[float]]] = {}
    for m in measurements:
        if m["scenario"].startswith("http x"):
            targets = bars.setdefault((m["workload"], m["scenario"]), {})
            targets.setdefault(m["target"], []).append(m["answered"] / m["seconds"])
    return bars


def _draw(axis: Any, targets: dict[str, list[float]], title: str) -> None:
    names = sorted(targets, key=lambda name: statistics.median(targets[name]))
    for place, name in enumerate(names):
        rates = targets[name]
        middle = statistics.median(rates)
        axis.barh(place, middle, color=OWN if name.startswith("inferno") else OTHER)
        axis.plot([min(rates), max(rates)], [place, place], color=RANGE, linewidth=1)
        label = f" {middle:,.0f}" if middle >= 100 else f" {middle:.1f}"
        axis.annotate(label, (max(rates), place), va="center", fontsize=7, annotation_clip=False)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.tick_params(axis="x", labelsize=7)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
