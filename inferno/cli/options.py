"""Options and helpers that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from inferno.client import Client
from inferno.operate.addresses import local_url
from inferno.settings import load

url_option = click.option("--url", help="URL of the platform (default: from the settings).")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
model_option = click.option("--model", help="Only this model.")
limit_option = click.option(
    "--limit",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Print at most this many.",
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation.")
task_argument = click.argument("task_id")
tasks_argument = click.argument("task_ids", nargs=-1, metavar="[TASK_ID]...")


class InOrder(click.Group):
    """A group that lists its commands in the order of their definition."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)


@contextmanager
def platform(url: str | None) -> Iterator[Client]:
    """Yield a client of the platform at a URL, by default at the URL of the settings."""
    with Client(url or local_url(load())) as client:
        yield client
