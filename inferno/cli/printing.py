"""Output of the commands: tables for people, lines of JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


def print_lines(documents: Iterable[Mapping[str, Any]]) -> None:
    """Print each document as one line of JSON."""
    for document in documents:
        click.echo(json.dumps(document))


def new_table(*titles: str) -> Table:
    """Return a table without rows."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        # Never cut an id off.
        table.add_column(title, no_wrap=title != "Error", overflow="fold")
    return table


def print_table(table: Table, nothing: str) -> None:
    """Print a table, or a message when the table has no rows."""
    if not table.row_count:
        out.print(nothing)
        return
    if not out.is_terminal:
        # In a pipe, each row must stay on one line.
        options = out.options.update(max_width=10_000)
        table.width = Measurement.get(out, options, table).maximum
    out.print(table, crop=False)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print facts with their titles; unknown ones are skipped."""
    for title, value in facts.items():
        if value is not None and value != "":
            out.print(f"  {title:<9} {escape(str(value))}", soft_wrap=True)


def versioned(document: Mapping[str, Any]) -> str:
    """Return a task's model with its version."""
    version = document.get("version")
    return f"{document.get('model', '')}{'' if version is None else f' v{version}'}"


def when(at: str | None) -> str:
    """Return a time stamp of the platform in this machine's time zone."""
    if at is None:
        return ""
    return datetime.fromisoformat(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as `2 tasks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
