"""The commands for lanes, over HTTP."""

from __future__ import annotations

import click
from rich.markup import escape

from inferno.cli.options import (
    InOrder,
    json_option,
    platform,
    url_option,
    yes_option,
)
from inferno.cli.printing import (
    counted,
    new_table,
    out,
    print_lines,
    print_table,
)


@click.group(cls=InOrder)
def lanes() -> None:
    """List, pause, resume and purge the lanes of the models."""


@lanes.command("list")
@json_option
@url_option
def list_lanes(as_json: bool, url: str | None) -> None:
    """Show how much is waiting for each model."""
    with platform(url) as client:
        found = client.lanes()
    if as_json:
        print_lines(found)
        return
    table = new_table("Model", "Waiting", "Held", "Delayed", "")
    for lane in found:
        counts = (str(lane[name]) for name in ("waiting", "held", "delayed"))
        table.add_row(escape(lane["model"]), *counts, "[yellow]paused[/]" if lane["paused"] else "")
    print_table(table, "No models.")


@lanes.command()
@click.argument("model")
@url_option
def pause(model: str, url: str | None) -> None:
    """Pause the lane of MODEL: tasks are accepted, but workers get none."""
    with platform(url) as client:
        client.pause(model)
    out.print(f"Paused {model}; `inferno lanes resume {model}` resumes it.", soft_wrap=True)


@lanes.command()
@click.argument("model")
@url_option
def resume(model: str, url: str | None) -> None:
    """Resume the lane of MODEL."""
    with platform(url) as client:
        client.resume(model)
    out.print(f"Resumed {model}.", soft_wrap=True)


@lanes.command()
@click.argument("model")
@yes_option
@url_option
def purge(model: str, yes: bool, url: str | None) -> None:
    """Cancel the tasks that wait for MODEL.

    Tasks that workers hold are not cancelled. Asks for confirmation with the number of tasks.
    """
    with platform(url) as client:
        lane = client.lane(model)
        count = lane["waiting"] + lane["delayed"]
        if count and not yes:
            click.confirm(f"Cancel {counted(count, 'task')} of {model}?", abort=True)
        cancelled = client.purge(model, count)
    out.print(f"Cancelled {counted(cancelled, 'task')}.")
