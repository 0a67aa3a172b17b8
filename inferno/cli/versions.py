"""The commands that load and activate versions of models, over HTTP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click
from rich.markup import escape

from inferno.cli.options import InOrder, json_option, platform, url_option
from inferno.cli.printing import new_table, out, print_lines, print_table

_COLOURS = {"ready": "green", "loading": "cyan", "failed": "red"}


@click.group(cls=InOrder)
def versions() -> None:
    """Show, load, activate and unload versions of the models."""


@versions.command("list")
@click.argument("model")
@json_option
@url_option
def list_versions(model: str, as_json: bool, url: str | None) -> None:
    """Show the versions of MODEL that each worker has loaded, and their shares."""
    with platform(url) as client:
        workers, active = client.model(model)["workers"], client.active(model)
    if as_json:
        print_lines(workers)
        return
    table = new_table("Version", "Share", "Worker", "State", "Digest", "Loaded in", "Error")
    for held in workers:
        share = active["shares"].get(str(held["version"]))
        table.add_row(
            str(held["version"]),
            "" if share is None else f"{100 * share:g} %",
            escape(held["worker"]),
            f"[{_COLOURS[held['state']]}]{held['state']}[/]",
            held.get("digest", ""),
            f"{held['load_s']:.1f} s" if "load_s" in held else "",
            escape(held.get("error") or ""),
        )
    print_table(table, "No worker has loaded a version.")
    if active["follows_latest"]:
        out.print("A newer version takes over once every worker has loaded it.")


@versions.command()
@click.argument("model")
@click.argument("version", type=click.IntRange(1), required=False)
@click.option("--no-activate", is_flag=True, help="Load it without sending it traffic.")
@url_option
def load(model: str, version: int | None, no_activate: bool, url: str | None) -> None:
    """Load a version of MODEL in every worker, then send it traffic.

    By default, loads the newest version; newer ones then take over automatically.
    """
    with platform(url) as client:
        answer = client.load(model, version, activate=not no_activate)
    _tell_loaded(answer)


@versions.command()
@click.argument("model")
@click.argument("version", type=click.IntRange(1), required=False)
@url_option
def unload(model: str, version: int | None, url: str | None) -> None:
    """Stop serving a version of MODEL, or every version, and free the workers' memory."""
    with platform(url) as client:
        client.unload(model, version)
    what = model if version is None else f"{model} version {version}"
    out.print(f"Unloaded {what}; `inferno versions load {model}` brings it back.", soft_wrap=True)


@versions.command()
@click.argument("model")
@click.argument("shares", nargs=-1, required=True, metavar="VERSION|latest|VERSION=WEIGHT...")
@url_option
def activate(model: str, shares: Sequence[str], url: str | None) -> None:
    """Choose the active versions of MODEL, which answer requests that name no version.

    Give one version, `latest`, or several versions with their weights: 1=90 2=10.
    """
    chosen: int | str | dict[int, float]
    if len(shares) == 1 and re.fullmatch(r"latest|[1-9][0-9]*", shares[0]):
        chosen = shares[0] if shares[0] == "latest" else int(shares[0])
    else:
        chosen = dict(map(_share, shares))
    with platform(url) as client:
        answer = client.activate(model, chosen)
    parts = ", ".join(f"version {v}: {100 * part:g} %" for v, part in answer["shares"].items())
    out.print(f"Requests to {model} go to {parts}.", soft_wrap=True)


def _share(text: str) -> tuple[int, float]:
    found = re.fullmatch(r"([1-9][0-9]*)=([0-9]+(?:\.[0-9]+)?)", text)
    if found is None:
        raise click.BadParameter(f"{text!r}: expected a version, latest, or VERSION=WEIGHT")
    return int(found[1]), float(found[2])


def _tell_loaded(answer: dict[str, Any]) -> None:
    for held in answer["workers"]:
        out.print(
            f"[green]✓[/] {escape(held['worker'])} loaded version {held['version']} in "
            f"{held.get('load_s', 0.0):.1f} s",
            soft_wrap=True,
        )
    out.print(f"Requests to {answer['name']} go to version {answer['active']}.", soft_wrap=True)
