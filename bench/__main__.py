"""The command line: `python -m bench run --targets inferno,flask --workloads echo --repeats 3`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec
from rich.console import Console

from bench import environments, raw, report, results, wrk
from bench.cache import Repository
from bench.load import Way
from bench.remainder import LoopsFailed
from bench.remainder import lines as describe_remainder
from bench.remainder import measure as measure_remainder
from bench.results import Results
from bench.session import Options, Session
from bench.swaps import lines as describe_swaps
from bench.swaps import measure as measure_swaps
from bench.targets import PEERS, Broken, Inferno, Target
from bench.workloads import WORKLOADS
from inferno.errors import InfernoError
from inferno.operate.settings_document import documented_settings

out = Console(highlight=False)
if not out.is_terminal:
    # In a pipe or a file, each row is one line.
    out.width = 250

TARGETS = ("inferno", *PEERS, raw.TARGET)


class _Names(click.ParamType[Any]):
    """Comma-separated names from a list; `all` selects every one."""

    name = "A,B"

    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        if not isinstance(value, str):
            return list(value)
        if value == "all":
            return list(self._known)
        names = [name.strip() for name in value.split(",") if name.strip()]
        for name in names:
            if name not in self._known:
                self.fail(f"{name!r}: expected one of {', '.join(self._known)}", param, ctx)
        return list(dict.fromkeys(names))


class _Numbers(click.ParamType[Any]):
    """Comma-separated positive integers."""

    name = "N,M"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        if not isinstance(value, str):
            return list(value)
        parts = [part for part in value.split(",") if part]
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"expected numbers such as 1,64: {value!r}", param, ctx)
        return list(map(int, parts))


def _settings(values: Sequence[str], label: str = "") -> dict[str, str]:
    settings = {}
    for value in values:
        name, is_given, content = value.partition("=")
        if not is_given or not name.startswith("INFERNO_"):
            raise click.BadParameter(f"expected {label}INFERNO_GROUP__FIELD=VALUE: {value!r}")
        # The platform ignores unknown settings, so a typo would measure the defaults.
        if name not in {setting.variable for setting in documented_settings()}:
            raise click.BadParameter(f"{name} is not a setting; docs/settings.md lists them all")
        settings[name] = content
    return settings


@click.group()
def main() -> None:
    """Measure Inferno beside other servers on this machine."""


@main.command()
@click.option("--targets", type=_Names(TARGETS), default="inferno,flask", show_default=True)
@click.option("--workloads", type=_Names(list(WORKLOADS)), default="echo", show_default=True)
@click.option("--connections", type=_Numbers(), default="64", show_default=True)
@click.option("--ways", type=_Names(list(Way)), default="http", show_default=True)
@click.option(
    "--rows", type=_Numbers(), default="1", show_default=True, help="Rows of one request."
)
@click.option("--seconds", type=click.IntRange(1, 300), default=5, show_default=True)
@click.option(
    "--warm-up",
    type=click.IntRange(0, 60),
    default=2,
    show_default=True,
    help="Seconds of load before each measurement.",
)
@click.option("--repeats", type=click.IntRange(1, 50), default=3, show_default=True)
@click.option("--open/--no-open", "open_loop", help="Also call at fixed rates.")
@click.option("--backlogs", type=_Numbers(), default="", help="Also drain this many waiting tasks.")
@click.option("--sockets", type=_Numbers(), default="", help="Also open this many idle sockets.")
@click.option(
    "--idle-s", type=click.FloatRange(1, 300), default=30, show_default=True, help="Idle time."
)
@click.option(
    "--env", multiple=True, metavar="NAME=VALUE", help="Set a setting of Inferno; repeatable."
)
@click.option(
    "--variant",
    multiple=True,
    metavar="LABEL:NAME=VALUE",
    help="Also measure Inferno with this setting, as the target inferno/LABEL; repeatable.",
)
@click.option("--flower", is_flag=True, help="Also run Flower beside Inferno.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: in build/bench-results.")
@click.option("--plot/--no-plot", help="Also draw the results.")
def run(
    targets: list[str],
    workloads: list[str],
    connections: list[int],
    ways: list[str],
    rows: list[int],
    seconds: int,
    warm_up: int,
    repeats: int,
    open_loop: bool,
    backlogs: list[int],
    sockets: list[int],
    idle_s: float,
    env: tuple[str, ...],
    variant: tuple[str, ...],
    flower: bool,
    output: Path | None,
    plot: bool,
) -> None:
    """Measure, show the results, and keep them as JSON.

    Separate lists with commas: --targets inferno,flask --connections 1,64. `all` selects every one.
    """
    if Way.HTTP in ways and 1 in rows:
        _require_wrk()
    settings = _settings(env)
    chosen = chosen_targets(targets, settings, read_variants(variant), flower=flower)
    options = Options(
        targets=chosen,
        workloads=[WORKLOADS[name] for name in workloads],
        connections=connections,
        ways=[Way(way) for way in ways],
        rows=rows,
        seconds=seconds,
        warm_up_s=warm_up,
        repeats=repeats,
        open_loop=open_loop,
        raw=raw.TARGET in targets,
        backlogs=backlogs,
        sockets=sockets,
        idle_s=idle_s,
    )
    described = {"seconds": seconds, "repeats": repeats, "env": settings, "variants": list(variant)}
    path = _carry_out(options, described, output)
    if plot:
        _plot(path)


@main.command()
@click.option(
    "--workloads", type=_Names(list(WORKLOADS)), default="simulated,embed", show_default=True
)
@click.option("--connections", type=_Numbers(), default="1,64", show_default=True)
@click.option(
    "--rows", type=_Numbers(), default="1", show_default=True, help="Rows of one request."
)
@click.option("--seconds", type=click.IntRange(1, 300), default=5, show_default=True)
@click.option(
    "--warm-up",
    type=click.IntRange(0, 60),
    default=2,
    show_default=True,
    help="Seconds of load before each measurement.",
)
@click.option("--repeats", type=click.IntRange(1, 50), default=3, show_default=True)
@click.option(
    "--env", multiple=True, metavar="NAME=VALUE", help="Set a setting of Inferno; repeatable."
)
@click.option("--output", type=click.Path(path_type=Path), help="Default: in build/bench-results.")
def cache(
    workloads: list[str],
    connections: list[int],
    rows: list[int],
    seconds: int,
    warm_up: int,
    repeats: int,
    env: tuple[str, ...],
    output: Path | None,
) -> None:
    """Measure what Inferno saves by doing equal work once."""
    if 1 in rows:
        _require_wrk()
    settings = _settings(env)
    with tempfile.TemporaryDirectory(prefix="bench-models-") as folder:
        shared = Repository(Path(folder, "models"))
        shared.root.mkdir()
        chosen = [WORKLOADS[name] for name in workloads]
        for model in {workload.model: workload for workload in chosen}.values():
            shared.add(model)
        options = Options(
            targets=[Inferno(env={"INFERNO_REPOSITORY__ROOT": str(shared.root), **settings})],
            workloads=chosen,
            connections=connections,
            ways=[Way.HTTP],
            rows=rows,
            seconds=seconds,
            warm_up_s=warm_up,
            repeats=repeats,
            shared=shared,
        )
        described = {"seconds": seconds, "repeats": repeats, "env": settings}
        _carry_out(options, described, output)


@main.command("swaps")
@click.option(
    "--model",
    type=click.Choice(["digits", "embed", "sentiment"]),
    default="embed",
    show_default=True,
)
@click.option("--swaps", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--rate", type=click.FloatRange(1, 10_000), default=50, show_default=True)
@click.option(
    "--before",
    type=click.IntRange(1, 600),
    default=30,
    show_default=True,
    help="Seconds of calls before the first swap.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write every call to this file, as JSON."
)
def swap(model: str, swaps: int, rate: float, before: int, output: Path | None) -> None:
    """Measure what hot swaps between two versions cost concurrent callers."""
    with tempfile.TemporaryDirectory(prefix="bench-swaps-") as folder:
        document = measure_swaps(Path(folder), model, swaps=swaps, rate_per_s=rate, before_s=before)
    if output is not None:
        output.write_text(json.dumps(document))
    for line in describe_swaps(document):
        click.echo(line)


@main.command()
@click.option(
    "--workload", type=click.Choice(["embed", "embed-int8"]), default="embed", show_default=True
)
@click.option("--connections", type=click.IntRange(1, 10_000), default=64, show_default=True)
@click.option("--seconds", type=click.IntRange(1, 300), default=8, show_default=True)
@click.option("--turns", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option(
    "--env", multiple=True, metavar="NAME=VALUE", help="Set a setting of Inferno; repeatable."
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write each turn to this file, as JSON."
)
def remainder(
    workload: str,
    connections: int,
    seconds: int,
    turns: int,
    env: tuple[str, ...],
    output: Path | None,
) -> None:
    """Measure how many calls the engine could answer beside the platform, and how many it does."""
    _require_wrk()
    settings = {"INFERNO_CACHE__ENABLED": "false", **_settings(env)}
    if "INFERNO_INFERENCE__CORES" in settings:
        raise click.BadParameter(
            "INFERNO_INFERENCE__CORES does not apply here: the loops run on all cores"
        )
    path = None if output is None else output.resolve()
    _clean_environment()
    try:
        found = measure_remainder(
            WORKLOADS[workload], connections, seconds, turns, settings, click.echo
        )
    except (LoopsFailed, Broken, wrk.WrkFailed, InfernoError) as exc:
        raise click.ClickException(str(exc)) from exc
    if path is not None:
        path.write_bytes(msgspec.json.encode(found))
    for line in describe_remainder(found):
        click.echo(line)


def _require_wrk() -> None:
    if shutil.which("wrk") is None:
        raise click.ClickException(wrk.INSTALL_HINT)


def _carry_out(options: Options, described: dict[str, Any], output: Path | None) -> Path:
    """Measure, show the results, and return their file; exit when nothing was measured."""
    path = (output or results.new_path()).resolve()
    found = Results(results.machine(), described)
    _clean_environment()
    try:
        for _ in Session(options, found, lambda line: out.print(line, markup=False)).run():
            found.save(path)
    finally:
        if found.measurements or found.failures:
            found.save(path)
            out.print(report.show(found))
            out.print(f"\n{path}", soft_wrap=True)
    if not found.measurements:
        sys.exit(1)
    return path


def read_variants(values: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return settings by label.

    Args:
      values: such as `always:INFERNO_REDIS__FSYNC=always`; a label may be repeated.
    Raises:
      BadParameter: a value has another form.
    """
    variants: dict[str, dict[str, str]] = {}
    for value in values:
        label, _, setting = value.partition(":")
        variants.setdefault(label, {}).update(_settings([setting], "LABEL:"))
    return variants


def chosen_targets(
    names: Sequence[str],
    env: Mapping[str, str],
    variants: Mapping[str, Mapping[str, str]],
    *,
    flower: bool,
) -> list[Target]:
    """Return targets by their names; Inferno is followed by its variants.

    Args:
      names: names of the targets.
      env: settings of Inferno and of its variants.
      variants: further settings of each variant, by label.
      flower: whether Flower runs beside Inferno.
    """
    targets: list[Target] = []
    for name in names:
        if name == "inferno":
            targets.append(Inferno(env=env, flower=flower))
            targets += [
                Inferno(f"inferno/{label}", {**env, **more}, flower)
                for label, more in variants.items()
            ]
        elif name in PEERS:
            targets.append(PEERS[name])
    return targets


def _clean_environment() -> None:
    """Remove the caller's own settings, and make SIGTERM end the run as Ctrl-C does."""
    for name in [name for name in os.environ if name.startswith("INFERNO_")]:
        del os.environ[name]
    os.chdir(environments.ROOT)

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


@main.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def show(file: Path) -> None:
    """Show the results of a run."""
    out.print(report.show(Results.read(file)))


@main.command()
@click.argument("before", type=click.Path(exists=True, path_type=Path))
@click.argument("after", type=click.Path(exists=True, path_type=Path))
def compare(before: Path, after: Path) -> None:
    """Compare two runs."""
    out.print(report.compare(Results.read(before), Results.read(after)))


@main.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def plot(file: Path) -> None:
    """Draw the results of a run, as SVG and PNG beside its file."""
    _plot(file)


def _plot(path: Path) -> None:
    try:
        python = environments.plot_python(out.print)
    except environments.NotInstalled as exc:
        raise click.ClickException(str(exc)) from exc
    command = [str(python), "-m", "bench.plot", str(path.resolve())]
    done = subprocess.run(command, cwd=environments.ROOT, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"{path} could not be drawn; see the reason above")


@main.command()
@click.argument("names", type=_Names(list(PEERS)), default="all")
def install(names: list[str]) -> None:
    """Install peers now, instead of when a run needs them."""
    failed = False
    for name in names:
        try:
            found = PEERS[name].install(out.print)
        except environments.NotInstalled as exc:
            out.print(f"[red]{exc}[/]", soft_wrap=True)
            failed = True
        else:
            out.print(f"{name}: {', '.join(f'{k} {v}' for k, v in found.items())}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
