"""The commands about this machine: `settings` and `doctor`."""

from __future__ import annotations

import sys

import click
from rich.markup import escape

from inferno.cli.printing import out
from inferno.operate.doctor import examine
from inferno.operate.procfile import enter_project
from inferno.operate.settings_document import (
    documented_settings,
    environment_example,
    settings_markdown,
)
from inferno.settings import load


@click.command()
@click.option("--markdown", "form", flag_value="markdown", help="Print docs/settings.md.")
@click.option("--env", "form", flag_value="env", help="Print .env.example.")
def settings(form: str | None) -> None:
    """List every setting with its value, default and meaning."""
    if form is not None:
        document = settings_markdown() if form == "markdown" else environment_example()
        click.echo(document, nl=False)
        return
    current = load()
    for setting in documented_settings():
        value = setting.value(current)
        is_default = value == setting.default
        shown = escape(value)
        out.print(
            f"[bold]{setting.variable}[/] = {shown if is_default else f'[green]{shown}[/]'}"
            f"{'' if is_default else f'  [dim](default: {escape(setting.default)})[/]'}",
            soft_wrap=True,
        )
        out.print(f"    {escape(setting.meaning.replace('`', ''))}", soft_wrap=True)


@click.command()
def doctor() -> None:
    """Check this machine, the installation and, if it runs, the platform.

    The exit code is 1 if a problem keeps Inferno from working.
    """
    enter_project()
    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failure": "[red]✗[/]"}
    failures = 0
    for finding in examine(load()):
        failures += finding.state == "failure"
        line = f"{marks[finding.state]} {finding.subject:<14} {escape(finding.detail)}"
        out.print(line, soft_wrap=True)
    if failures:
        out.print(f"\n{failures} problem{'' if failures == 1 else 's'} found.")
    sys.exit(1 if failures else 0)
