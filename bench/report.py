"""Results as tables: one run, or two runs compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.results import Results, Summary, summarise
from bench.workloads import WORKLOADS

#: Target that the others are compared with.
REFERENCE = "inferno"
#: A generator cannot keep up if one in a hundred requests is later than this.
LATE_MS = 20.0
#: Kinds of processes, in the order of a cell.
_KINDS = ("web", "worker", "redis", "webhooks", "flower", "supervisor", "server", "engine")
#: Kind of the load generator, which is not part of the target.
LOAD = "load"


def show(results: Results) -> RenderableType:
    """Return the tables of a run."""
    parts: list[RenderableType] = [_head(results)]
    summaries = summarise(results.measurements)
    for name in dict.fromkeys(s.workload for s in summaries):
        parts.append(Text(f"\n{name}: {WORKLOADS[name].description}", "bold"))
        of_workload = [s for s in summaries if s.workload == name]
        # Scenarios that only Inferno supports have values of their own, and no ratios.
        ordinary = [s for s in of_workload if not s.values]
        parts += [_rates(ordinary), _costs(ordinary)]
        special = [s for s in of_workload if s.values]
        if special:
            parts.append(_specials(special))
    parts += _notes(results, summaries)
    return Group(*parts)


def _head(results: Results) -> Text:
    m = results.machine
    changed = " with changes" if m["modified"] else ""
    options = ", ".join(f"{name} {value}" for name, value in results.options.items() if value)
    return Text(
        f"{m['at']}, commit {m['commit']}{changed}\n"
        f"{m['cores']} cores of {m['cpu']}, {m['memory_gib']} GiB; Python {m['python']}, "
        f"{m['redis']}\n{options}"
    )


def _rates(summaries: Sequence[Summary]) -> Table:
    table = _table("Scenario", "Target", "Answers/s", "Range", "Ratio")
    for title in ("p50 ms", "p90", "p95", "p99", "Max", "Batch", "Errors"):
        table.add_column(title, justify="right")
    shows_cached = any(s.cached is not None for s in summaries)
    if shows_cached:
        table.add_column("Cached", justify="right")
    own = {s.scenario: s for s in summaries if s.target == REFERENCE}
    for label, s in _by_scenario(table, summaries):
        reference = own.get(s.scenario)
        table.add_row(
            label,
            escape(s.target),
            _rate(s.rate),
            "-".join(map(_rate, s.rate_range)) if s.repeats > 1 else "",
            f"{s.rate / reference.rate:.2f}" if reference and reference.rate else "",
            *(_ms(s.latency_ms.get(name)) for name in ("p50", "p90", "p95", "p99", "max")),
            f"{s.mean_batch:.1f}" if s.mean_batch else "",
            _errors(s),
            *(["" if s.cached is None else f"{s.cached:.0%}"] if shows_cached else []),
        )
    return table


def _costs(summaries: Sequence[Summary]) -> Table:
    table = _table("Scenario", "Target", "CPU s per 1,000")
    for title in ("of which", "load", "RSS MiB", "of which"):
        table.add_column(title, justify="left" if title == "of which" else "right")
    for label, s in _by_scenario(table, summaries):
        cpu, rss = _own(s.cpu_s_per_1000), _own(s.rss_bytes)
        table.add_row(
            label,
            escape(s.target),
            f"{sum(cpu.values()):.3f}",
            ", ".join(f"{kind} {value:.3f}" for kind, value in cpu.items()),
            f"{s.cpu_s_per_1000.get(LOAD, 0.0):.3f}",
            f"{sum(rss.values()) / 2**20:,.0f}",
            ", ".join(f"{kind} {value / 2**20:,.0f}" for kind, value in rss.items()),
        )
    return table


def _table(*titles: str) -> Table:
    """Return a table with these columns; the first two are left-aligned text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < 2 else "right", no_wrap=True)
    return table


def _by_scenario(table: Table, summaries: Sequence[Summary]) -> Iterator[tuple[str, Summary]]:
    """Yield summaries grouped by scenario; the first of each group has the scenario's name."""
    for scenario in dict.fromkeys(s.scenario for s in summaries):
        label = scenario
        for s in summaries:
            if s.scenario == scenario:
                yield label, s
                label = ""
        table.add_section()


def _specials(summaries: Sequence[Summary]) -> Table:
    table = _table("Scenario", "Target", "us per task")
    for title in ("CPU s per 1,000", "and", "Errors"):
        table.add_column(title)
    for s in summaries:
        table.add_row(
            s.scenario,
            escape(s.target),
            f"{1e6 / s.rate:,.0f}" if s.rate else "",
            ", ".join(f"{kind} {value:.3f}" for kind, value in _own(s.cpu_s_per_1000).items()),
            ", ".join(f"{name} {value:,.1f}" for name, value in s.values.items()),
            _errors(s),
        )
    return table


def _notes(results: Results, summaries: Sequence[Summary]) -> Iterator[RenderableType]:
    for s in summaries:
        if s.errors:
            yield Text(f"{s.workload}, {s.scenario}: {s.target} had errors: {s.sample}", "red")
        if s.late_ms is not None and s.late_ms > LATE_MS:
            yield Text(
                f"{s.workload}, {s.scenario}: the generator was {s.late_ms:.0f} ms late for "
                f"{s.target}; these latencies include its own delay",
                "yellow",
            )
    for failure in results.failures:
        workload = f" ({failure.workload})" if failure.workload else ""
        yield Text(f"{failure.target}{workload} was not measured: {failure.reason}", "yellow")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _errors(s: Summary) -> str:
    return f"[red]{s.errors:,}[/]" if s.errors else ""


def _own(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values of the target's own processes, without the generator, in order."""
    return {kind: values[kind] for kind in _KINDS if kind in values}


@dataclass(frozen=True)
class Difference:
    """One scenario of one target in two runs."""

    before: Summary
    after: Summary

    @property
    def ratio(self) -> float:
        """Rate after over rate before."""
        return self.after.rate / self.before.rate if self.before.rate else 0.0

    @property
    def is_clear(self) -> bool:
        """Whether every repeat of one run was faster than every repeat of the other."""
        (low_a, high_a), (low_b, high_b) = self.before.rate_range, self.after.rate_range
        enough = self.before.repeats > 1 and self.after.repeats > 1
        return enough and (low_b > high_a or low_a > high_b)


def differences(before: Results, after: Results) -> list[Difference]:
    """Return the differences of everything that both runs measured."""
    earlier = {(s.workload, s.scenario, s.target): s for s in summarise(before.measurements)}
    return [
        Difference(earlier[s.workload, s.scenario, s.target], s)
        for s in summarise(after.measurements)
        if (s.workload, s.scenario, s.target) in earlier
    ]


def compare(before: Results, after: Results) -> RenderableType:
    """Return a table that compares two runs."""
    parts: list[RenderableType] = []
    for name, results in (("before", before), ("after", after)):
        parts += [Text(name, "bold"), _head(results)]
    for key in ("cpu", "cores", "python", "redis"):
        if before.machine[key] != after.machine[key]:
            parts.append(
                Text(f"{key} differs: {before.machine[key]}, {after.machine[key]}", "yellow")
            )
    table = _table("Workload", "Scenario", "Target", "Answers/s", "after", "Ratio", "", "p50 ms")
    for title in ("after", "p99 ms", "after", "Batch", "after", "CPU s per 1,000", "after"):
        table.add_column(title, justify="right")
    for title in ("Errors", "after"):
        table.add_column(title, justify="right")
    for d in differences(before, after):
        a, b = d.before, d.after
        colour = "green" if d.ratio > 1 else "red"
        ratio = f"{d.ratio:.2f}" if d.ratio else ""
        table.add_row(
            a.workload,
            a.scenario,
            escape(a.target),
            _rate(a.rate),
            _rate(b.rate),
            f"[{colour}]{ratio}[/]" if d.is_clear else ratio,
            "" if d.is_clear or not d.ratio else "within noise",
            *(_ms(s.latency_ms.get(name)) for name in ("p50", "p99") for s in (a, b)),
            *(f"{s.mean_batch:.1f}" if s.mean_batch else "" for s in (a, b)),
            *(_cpu(s) for s in (a, b)),
            *(_errors(s) for s in (a, b)),
        )
    return Group(*parts, table)


def _cpu(s: Summary) -> str:
    cpu = _own(s.cpu_s_per_1000)
    return f"{sum(cpu.values()):.3f}" if cpu else ""
