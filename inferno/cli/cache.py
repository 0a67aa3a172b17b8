"""The commands for kept results, over HTTP."""

from __future__ import annotations

import click
from rich.markup import escape

from inferno.cli.options import (
    InOrder,
    json_option,
    model_option,
    platform,
    url_option,
)
from inferno.cli.printing import (
    counted,
    new_table,
    out,
    print_lines,
    print_table,
)


@click.group(cls=InOrder)
def cache() -> None:
    """Show and clear the kept results."""


@cache.command("show")
@json_option
@url_option
def show_cache(as_json: bool, url: str | None) -> None:
    """Show the kept results, and how often they were used."""
    with platform(url) as client:
        found = client.cache()
    if as_json:
        print_lines([found])
        return
    out.print(
        f"{counted(found['entries'], 'result')} of at most {found['max_entries']}, "
        f"{found['bytes']} bytes of at most {found['max_bytes']}."
    )
    counts = ("hits", "misses", "coalesced", "deduplicated")
    table = new_table("Model", *map(str.capitalize, counts))
    for model in found["models"]:
        table.add_row(escape(model["model"]), *(str(model[name]) for name in counts))
    print_table(table, "No models.")


@cache.command("clear")
@model_option
@url_option
def clear_cache(model: str | None, url: str | None) -> None:
    """Delete the kept results."""
    with platform(url) as client:
        out.print(f"Cleared {counted(client.clear_cache(model), 'result')}.")
