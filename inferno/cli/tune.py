"""The commands that find a model's settings: `tune` measures and proposes, `simulate` predicts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TextIO

import click
import msgspec
from rich import box
from rich.table import Table

from inferno.batching.simulation import crowd, poisson, recorded
from inferno.cli.printing import err, out
from inferno.engine.cores import Cores
from inferno.errors import ConfigurationError
from inferno.operate.procfile import enter_project
from inferno.packaging import tuning
from inferno.packaging.tuning import Choice, Measured
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import Settings, load


def _package(name: str, version: int | None, settings: Settings) -> Package:
    return Repository.read(settings.repository).model(name).package(version)


# -- Tune ------------------------------------------------------------------------------------------


@click.command()
@click.argument("model")
@click.option("--version", type=int, help="Model version (default: the active one).")
@click.option(
    "--slo-p95-ms", type=click.FloatRange(0, min_open=True), help="Latency objective in ms."
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Expected tasks per second (default: as many as the model can handle).",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Time to measure each batch size, in seconds.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Plot the curves to an SVG file.",
)
@click.option(
    "--save", type=click.Path(path_type=Path, dir_okay=False), help="Save the curve for `simulate`."
)
def tune(
    model: str,
    version: int | None,
    slo_p95_ms: float | None,
    rate: float | None,
    seconds: float,
    plot: Path | None,
    save: Path | None,
) -> None:
    """Measure MODEL in this process and propose its settings.

    Measures forward passes of the warm-up sample for each batch size, with one executor and with
    several that share the cores. Then simulates the lane with each batch size and window.
    """
    enter_project()
    settings = load()
    package = _package(model, version, settings)
    measured: list[Measured] = []
    kept = settings.inference.cores
    with out.status("") as status, Cores(kept).taken():
        for executors, threads in tuning.candidates(len(kept) or None):
            measured.append(
                tuning.measure(
                    package, settings.batching, settings.inference, executors, threads, seconds,
                    lambda step: status.update(f"{model}: {step}"),
                )
            )  # fmt: skip
        status.update(f"{model}: simulating")
        best = tuning.quickest(measured)
        choices = list(tuning.choices(best, rate=rate))
    out.print(_curves(measured))
    if save is not None:
        save.write_bytes(msgspec.json.format(msgspec.json.encode(best), indent=1))
    if plot is not None:
        _draw(measured, plot)
    choice = tuning.recommend(choices, slo_p95_ms=slo_p95_ms, rate=rate)
    if choice is None:
        nearest = min(choices, key=lambda choice: choice.p95_ms)
        out.print(_simulated([nearest]))
        err.print("[red]No batch size and window meet the objective.[/] The nearest is above.")
        sys.exit(1)
    _print_recommendation(choice, best)


def _print_recommendation(choice: Choice, best: Measured) -> None:
    out.print(_simulated([choice]))
    out.print(
        "Put this into model.yaml:\n\n"
        f"batching: {{max_batch_size: {choice.max_batch_size}, "
        f"max_batch_delay_ms: {choice.max_batch_delay_ms:g}}}\n"
        f"concurrency: {{max_concurrency: {best.executors}}}\n\n"
        f"On this machine, each executor then has {_number(best.threads, 'thread')}.",
        soft_wrap=True,
    )


def _curves(measured: Sequence[Measured]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Rows", justify="right")
    for m in measured:
        title = f"{_number(m.executors, 'executor')}, {_number(m.threads, 'thread')}"
        table.add_column(f"{title}: ms", justify="right")
        table.add_column("rows/s", justify="right")
    for rows in measured[0].seconds:
        cells = [str(rows)]
        for m in measured:
            rate = f"{m.rows_per_s(rows):.0f}"
            cells += [
                f"{m.seconds[rows] * 1000:.2f}",
                f"[bold]{rate}[/]" if rows == m.best else rate,
            ]
        table.add_row(*cells)
    return table


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _draw(measured: Sequence[Measured], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "--plot needs matplotlib; install it with `pip install matplotlib`"
        ) from None
    figure = Figure(figsize=(9, 4), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for m in measured:
        sizes = list(m.seconds)
        label = f"{m.executors} x {m.threads} threads"
        latency.plot(sizes, [m.seconds[n] * 1000 for n in sizes], marker="o", label=label)
        throughput.plot(sizes, [m.rows_per_s(n) for n in sizes], marker="o", label=label)
    latency.set(title=f"{measured[0].model} version {measured[0].version}", ylabel="ms per pass")
    throughput.set(title=f"on {measured[0].device}", ylabel="rows per second")
    for axes in (latency, throughput):
        axes.set(xlabel="rows per pass", xscale="log", ylim=(0, None))
        axes.set_xticks(list(measured[0].seconds), map(str, measured[0].seconds))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    latency.legend()
    figure.savefig(file, format="svg")


# -- Simulate --------------------------------------------------------------------------------------


@click.command()
@click.argument("model")
@click.option("--version", type=int, help="Model version (default: the active one).")
@click.option(
    "--curve",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File from `tune --save` (default: measure now).",
)
@click.option(
    "--clients", type=click.IntRange(1), help="Clients that call again after each answer."
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Independent tasks per second."
)
@click.option(
    "--arrivals",
    type=click.File(),
    help="File of recorded arrival times in seconds, one per line.",
)
@click.option(
    "--size", "sizes", type=click.IntRange(1), multiple=True,
    help="Maximum batch size; may be repeated (default: the model's).",
)  # fmt: skip
@click.option(
    "--delay-ms", "delays_ms", type=click.FloatRange(0), multiple=True,
    help="Window in ms; may be repeated (default: the model's).",
)  # fmt: skip
@click.option(
    "--executors", type=click.IntRange(1), help="Concurrent forward passes (default: as measured)."
)
@click.option(
    "--slo-p95-ms",
    type=click.FloatRange(0, min_open=True),
    help="Latency objective in ms (default: the model's).",
)
@click.option("--fixed", is_flag=True, help="Do not end the window early.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Time to simulate, in seconds.",
)
def simulate(
    model: str,
    version: int | None,
    curve: Path | None,
    clients: int | None,
    rate: float | None,
    arrivals: TextIO | None,
    sizes: tuple[int, ...],
    delays_ms: tuple[float, ...],
    executors: int | None,
    slo_p95_ms: float | None,
    fixed: bool,
    seconds: float,
) -> None:
    """Simulate settings of MODEL with given arrivals, on a virtual clock.

    Uses the real batch former and measured pass times. Each task has one row. The same curve and
    arrivals always give the same table.
    """
    given = [name for name in (clients, rate, arrivals) if name is not None]
    if len(given) != 1:
        raise click.UsageError("expected one of --clients, --rate and --arrivals")
    enter_project()
    settings = load()
    package = _package(model, version, settings)
    if curve is not None:
        measured = _read(curve, package)
    else:
        measured = _measure(package, settings, executors or package.executors)
    if executors is not None:
        measured = msgspec.structs.replace(measured, executors=executors)
    delay_ms = package.max_batch_delay_ms(settings.batching.max_batch_delay_ms)
    times = _times(arrivals) if arrivals is not None else []

    def calls() -> Iterator[tuple[float, int]]:
        if clients is not None:
            return crowd(clients, spacing=tuning.FRONT_END_S)
        return recorded(times) if rate is None else poisson(rate, seconds)

    out.print(
        _simulated(
            [
                tuning.simulate(
                    measured,
                    calls(),
                    until=seconds,
                    max_batch_size=size,
                    max_batch_delay_ms=delay,
                    closed_loop=clients is not None,
                    adaptive=settings.batching.adaptive and not fixed,
                    slo_p95_ms=slo_p95_ms or package.slo_p95_ms(settings.batching.slo_p95_ms),
                )
                for size, delay in product(
                    sizes or [package.max_batch_size(settings.batching.max_batch_size)],
                    delays_ms or [delay_ms],
                )
            ]
        )
    )


def _measure(package: Package, settings: Settings, executors: int) -> Measured:
    with out.status("") as status, Cores(settings.inference.cores).taken():
        return tuning.measure(
            package, settings.batching, settings.inference, executors,
            package.inference(settings.inference).pass_threads(executors), 0.5,
            lambda step: status.update(f"{package.name}: {step}"),
        )  # fmt: skip


def _times(file: TextIO) -> list[float]:
    try:
        return [float(line) for line in file if line.strip()]
    except ValueError as exc:
        raise ConfigurationError(
            f"--arrivals: {exc}; expected times in seconds, one per line"
        ) from None


def _read(file: Path, package: Package) -> Measured:
    try:
        measured = msgspec.json.decode(file.read_bytes(), type=Measured)
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigurationError(
            f"{file}: expected a file from `inferno tune --save`: {exc}"
        ) from None
    if measured.model != package.name or not measured.seconds:
        raise ConfigurationError(f"{file}: expected {package.name}, got {measured.model}")
    return measured


def _simulated(choices: Sequence[Choice]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    titles = ("Size", "Delay ms", "Tasks/s", "p50 ms", "p95 ms", "p99 ms", "Mean batch")
    for title in titles:
        table.add_column(title, justify="right")
    table.add_column("Sent because")
    for choice in choices:
        report = choice.report
        reasons = report.reasons.most_common()
        table.add_row(
            str(choice.max_batch_size),
            f"{choice.max_batch_delay_ms:g}",
            f"{report.tasks_per_s:.0f}",
            *(f"{report.percentile(p) * 1000:.1f}" for p in (50, 95, 99)),
            f"{report.mean_size:.1f}",
            ", ".join(f"{name} {count / len(report.batches):.0%}" for name, count in reasons),
        )
    return table
