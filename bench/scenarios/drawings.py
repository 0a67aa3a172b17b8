"""The plots of the scenarios: each function draws the document of one scenario."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.scenarios import plots
from bench.scenarios import pressure as pressures

Document = dict[str, Any]


def crowd(document: Document, figure: Figure) -> None:
    """Draw the accepted and finished tasks over time, and the batches."""
    tasks, batches, clients = document["tasks"], document["batches"], document["clients"]
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, colour, share, offset in (
        ("accepted", plots.BLUE, 0.6, (-6, 4)),
        ("finished", plots.VERMILION, 0.3, (6, -4)),
    ):
        times_s = sorted(task[f"{name}_s"] for task in tasks if f"{name}_s" in task)
        plots.cumulative(upper, times_s, colour)
        at = times_s[int(len(times_s) * share)], len(times_s) * share
        plots.label(upper, at, name, colour, offset)
    upper.set_ylabel("tasks")
    upper.set_ylim(0, clients * 1.05)
    lower.scatter(
        [batch["finished_s"] for batch in batches],
        [batch["size"] for batch in batches],
        s=16,
        color=plots.GREEN,
        alpha=0.8,
        linewidths=0,
    )
    most = document["max_batch_size"]
    lower.axhline(most, color=plots.GREY, linewidth=0.8, linestyle="--")
    plots.label(lower, (0, most), "a full batch", plots.GREY, (4, 3))
    lower.set_ylim(0, most * 1.3)
    lower.set_ylabel("tasks in a batch")
    lower.set_xlabel("seconds since all clients began")
    lower.set_xlim(0)


def latency(document: Document, figure: Figure) -> None:
    """Draw latency and batch size over the rate of arrivals, with and without batches."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    looks = {"batched": (plots.BLUE, "in batches"), "alone": (plots.VERMILION, "one by one")}
    for model, (colour, name) in looks.items():
        points = [point for point in document["points"] if point["model"] == model]
        rates = [point["rate_per_s"] for point in points]
        by_name = {
            key: [point["latency_ms"][key] for point in points] for key in points[0]["latency_ms"]
        }
        upper.fill_between(rates, by_name["p50"], by_name["p99"], color=colour, alpha=0.15, lw=0)
        upper.plot(rates, by_name["p95"], color=colour, marker="o", markersize=4)
        plots.label(upper, (rates[-1], by_name["p95"][-1]), f"{name}, p95", colour, (-8, 8))
        batches = [point["mean_batch"] for point in points]
        lower.plot(rates, batches, color=colour, marker="o", markersize=4)
        plots.label(lower, (rates[-1], batches[-1]), name, colour, (-8, 6))
    sla_ms = document["sla_ms"]
    upper.axhline(sla_ms, color=plots.GREY, linewidth=0.9, linestyle="--")
    first = document["points"][0]["rate_per_s"]
    plots.label(upper, (first, sla_ms), f"SLA: {sla_ms:g} ms", plots.GREY, (2, 3))
    for axes in (upper, lower):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(
            FixedLocator(sorted({p["rate_per_s"] for p in document["points"]}))
        )
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    upper.set_ylim(5)
    upper.set_ylabel("latency, ms (p50 to p99 shaded)")
    lower.set_ylabel("mean batch, tasks")
    lower.set_xlabel("calls a second")


def retries(document: Document, figure: Figure) -> None:
    """Draw the attempts of each task that failed at first, and what the platform showed."""
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2), width_ratios=(3, 2))
    upper = figure.add_subplot(grid[0, :])
    left, right = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    tasks: dict[int, list[tuple[float, str]]] = {}
    for event in document["events"]:
        if event["kind"] != "started":
            tasks.setdefault(event["task"], []).append((event["at_s"], event["kind"]))
    rows = [events for _, events in sorted(tasks.items()) if events[0][1] != "succeeded"]
    gap = (np.nan, np.nan)
    lines = [
        point
        for row, events in enumerate(rows)
        for point in ((events[0][0], row), (events[-1][0], row), gap)
    ]
    upper.plot(*zip(*lines, strict=True), color="#cccccc", linewidth=1)
    for kind, colour, marker in (
        ("retried", plots.ORANGE, "o"),
        ("succeeded", plots.GREEN, "o"),
        ("failed", plots.VERMILION, "X"),
    ):
        at = [
            (at_s, row)
            for row, events in enumerate(rows)
            for at_s, found in events
            if found == kind
        ]
        if at:
            size = 5 if marker == "X" else 3
            upper.plot(*zip(*at, strict=True), marker, color=colour, markersize=size, mew=0)
    for place, (text, colour) in enumerate(
        (
            ("an attempt failed", plots.ORANGE),
            ("the task succeeded", plots.GREEN),
            ("it failed for the last time", plots.VERMILION),
        )
    ):
        upper.annotate(
            text,
            (0.01, 0.95 - 0.1 * place),
            xycoords="axes fraction",
            color=colour,
            fontweight="bold",
            va="top",
        )
    upper.set_ylabel("tasks that failed at first")
    upper.set_xlabel("seconds")
    upper.set_xlim(0)
    upper.set_ylim(-2, len(rows) + 1)
    at_s, delayed, dead = (
        [look[name] for look in document["looks"]] for name in ("at_s", "delayed", "dead")
    )
    left.plot(at_s, delayed, color=plots.ORANGE, linewidth=1.5)
    left.step(at_s, dead, color=plots.VERMILION, linewidth=1.5, where="post")
    most = int(np.argmax(delayed))
    plots.label(left, (at_s[most], delayed[most]), "waiting for an attempt", plots.ORANGE, (0, 4))
    plots.label(left, (at_s[-1], dead[-1]), "dead letters", plots.VERMILION, (-2, 5))
    left.set_ylim(0, max(delayed) * 1.3 + 1)
    left.set_xlim(0)
    left.set_ylabel("tasks")
    left.set_xlabel("seconds")
    attempts = document["attempts"]
    bars = right.barh(list(attempts), list(attempts.values()), color=plots.BLUE, height=0.6)
    right.bar_label(bars, padding=3)
    right.invert_yaxis()
    right.grid(visible=False)
    right.set_xlim(0, max(attempts.values()) * 1.2)
    right.set_ylabel("attempts")
    right.set_xlabel("tasks")


def pressure(document: Document, figure: Figure) -> None:
    """Draw calls, waiting tasks, latencies and refusals."""
    rates, depth, latency_s, refused = figure.subplots(4, 1, sharex=True)
    phases_s, calls, looks = document["phases_s"], document["calls"], document["looks"]
    end_s, high_s = sum(phases_s), sum(phases_s[:2]) + phases_s[2] / 2
    seconds = np.arange(0, int(end_s) + 1)
    middles = seconds[:-1] + 0.5

    capacity = document["capacity_per_s"]
    fine = np.arange(0, end_s, 0.1)
    offered = [pressures.rate_per_s(at_s, phases_s) for at_s in fine]
    ends_s = [call["at_s"] + call["latency_ms"] / 1e3 for call in calls if call["status"] == 200]
    answered = np.histogram(ends_s, seconds)[0]
    rates.plot(fine, offered, color=plots.BLUE)
    rates.plot(middles, answered, color=plots.GREEN)
    rates.axhline(capacity, color=plots.GREY, linewidth=0.9, linestyle="--")
    plots.label(rates, (high_s, max(offered)), "calls made", plots.BLUE, (0, -6))
    plots.label(rates, (high_s, answered[int(high_s)]), "answered", plots.GREEN, (0, -8))
    plots.label(rates, (0, capacity), "the model's limit", plots.GREY, (4, 3))
    rates.set_ylim(0)
    rates.set_ylabel("calls a second")

    at_s = [look["at_s"] for look in looks]
    for name, text, colour, offset in (
        ("waiting", "waiting in the lane", plots.BLUE, (0, -10)),
        ("held", "held by the worker", plots.ORANGE, (0, 6)),
    ):
        counts = [look[name] for look in looks]
        depth.plot(at_s, counts, color=colour, linewidth=1.5)
        plots.label(depth, (high_s, np.interp(high_s, at_s, counts)), text, colour, offset)
    depth.set_ylabel("tasks")

    took = [(call["at_s"], call["latency_ms"] / 1e3) for call in calls if call["status"] == 200]
    for share, colour, offset in ((95, plots.VERMILION, (0, 7)), (50, plots.BLUE, (0, -8))):
        values = [
            np.percentile([s for at, s in took if begin <= at < begin + 1] or [np.nan], share)
            for begin in seconds[:-1]
        ]
        latency_s.plot(middles, values, color=colour)
        at = (high_s, values[int(high_s)])
        plots.label(latency_s, at, f"p{share} of answered calls", colour, offset)
    limit_s = document["timeout_ms"] / 1e3
    latency_s.axhline(limit_s, color=plots.GREY, linewidth=0.9, linestyle="--")
    plots.label(latency_s, (0, limit_s), "timeout_ms: pass must start", plots.GREY, (4, 3))
    latency_s.set_ylim(0, limit_s * 1.6)
    latency_s.set_ylabel("latency, s")

    bottom = np.zeros(len(middles))
    for status, text, colour, place in (
        (429, "refused at once (429)", plots.PURPLE, 0.86),
        (504, "accepted, not started in time (504)", plots.SKY, 0.70),
    ):
        found = [call["at_s"] for call in calls if call["status"] == status]
        heights = np.histogram(found, seconds)[0]
        refused.bar(middles, heights, width=0.85, bottom=bottom, color=colour)
        bottom += heights
        refused.annotate(
            text, (0.01, place), xycoords="axes fraction", color=colour, fontweight="bold"
        )
    refused.set_ylabel("calls a second")
    refused.set_xlabel("seconds")
    refused.set_xlim(0, end_s)
