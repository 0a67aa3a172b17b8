"""The commands for dead letters, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice

import click
from rich.markup import escape

from inferno.cli.options import (
    InOrder,
    json_option,
    limit_option,
    model_option,
    platform,
    task_argument,
    tasks_argument,
    url_option,
    yes_option,
)
from inferno.cli.printing import (
    counted,
    new_table,
    out,
    print_facts,
    print_lines,
    print_table,
    versioned,
    when,
)


@click.group(cls=InOrder)
def dead() -> None:
    """List, show, replay and discard tasks that were given up."""


@dead.command("list")
@model_option
@limit_option
@json_option
@url_option
def list_dead(model: str | None, limit: int, as_json: bool, url: str | None) -> None:
    """List the newest dead letters, newest first."""
    with platform(url) as client:
        found = list(islice(client.dead_letters(model=model), limit))
        count = client.count_dead_letters()
    if as_json:
        print_lines(found)
        return
    table = new_table("Task", "Model", "Died", "Retries", "Error")
    for letter in found:
        table.add_row(
            letter["task_id"],
            escape(versioned(letter)),
            when(letter["died_at"]),
            str(letter["retries"]),
            escape(letter["error"]["detail"]),
        )
    print_table(table, "No dead letters.")
    if len(found) < count:
        out.print(f"{count} in total.")


@dead.command("show")
@task_argument
@json_option
@url_option
def show_dead(task_id: str, as_json: bool, url: str | None) -> None:
    """Show why a task was given up, and its request."""
    with platform(url) as client:
        letter = client.dead_letter(task_id)
    if as_json:
        print_lines([letter])
        return
    print_facts(
        {
            "task": letter["task_id"],
            "model": versioned(letter),
            "error": f"{letter['error']['code']}: {letter['error']['detail']}",
            "retries": letter["retries"],
            "accepted": when(letter["accepted_at"]),
            "died": when(letter["died_at"]),
            "batch": letter["batch_id"],
        }
    )
    out.print(f"\n{escape(letter['traceback'].rstrip())}", soft_wrap=True)
    out.print(f"\nRequest\n  {escape(json.dumps(letter['payload']))}", soft_wrap=True)


@dead.command()
@tasks_argument
@click.option("--all", "everything", is_flag=True, help="Replay all dead letters.")
@model_option
@url_option
def replay(task_ids: Sequence[str], everything: bool, model: str | None, url: str | None) -> None:
    """Run dead tasks again, as new tasks, and print their ids.

    Choose them by id, --all or --model. Replayed letters are removed.
    """
    if bool(task_ids) == (everything or model is not None):
        raise click.UsageError("give the ids of tasks, or --all, or --model")
    with platform(url) as client:
        for task_id in task_ids:
            click.echo(client.replay(task_id).id)
        if task_ids:
            return
        answer = client.replay_all(model=model)
    for task in answer["tasks"]:
        click.echo(task["task_id"])
    if answer["left"]:
        raise click.ClickException(
            f"{answer['left']} could not be replayed: their models are no longer in the repository"
        )


@dead.command()
@tasks_argument
@click.option("--all", "everything", is_flag=True, help="Discard all dead letters.")
@yes_option
@url_option
def discard(task_ids: Sequence[str], everything: bool, yes: bool, url: str | None) -> None:
    """Delete dead letters for good."""
    if bool(task_ids) == everything:
        raise click.UsageError("give the ids of tasks, or --all")
    with platform(url) as client:
        for task_id in task_ids:
            client.discard(task_id)
            out.print(f"Discarded {task_id}.", soft_wrap=True)
        if not everything:
            return
        count = client.count_dead_letters()
        if count and not yes:
            click.confirm(f"Discard {counted(count, 'dead letter')}?", abort=True)
        client.discard_all(count)
    out.print(f"Discarded {counted(count, 'dead letter')}.")
