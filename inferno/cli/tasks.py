"""The commands for tasks, over HTTP."""

from __future__ import annotations

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
    url_option,
)
from inferno.cli.printing import (
    new_table,
    out,
    print_facts,
    print_lines,
    print_table,
    versioned,
    when,
)
from inferno.protocol.tasks import TaskState

#: Colours of the states.
_COLOURS = {
    TaskState.RUNNING: "cyan",
    TaskState.RETRYING: "yellow",
    TaskState.SUCCEEDED: "green",
    TaskState.FAILED: "red",
    TaskState.EXPIRED: "red",
    TaskState.CANCELLED: "dim",
}


@click.group(cls=InOrder)
def tasks() -> None:
    """List, show, cancel and retry tasks."""


@tasks.command("list")
@click.option(
    "--status",
    multiple=True,
    type=click.Choice(list(map(str, TaskState))),
    help="Only this state; may be repeated.",
)
@model_option
@limit_option
@json_option
@url_option
def list_tasks(
    status: Sequence[str], model: str | None, limit: int, as_json: bool, url: str | None
) -> None:
    """List the newest tasks, newest first."""
    with platform(url) as client:
        found = list(islice(client.tasks(status=status, model=model), limit))
    if as_json:
        print_lines(found)
        return
    table = new_table("Task", "Model", "Status", "Attempts", "Accepted")
    for task in found:
        state = task["status"]
        table.add_row(
            task["task_id"],
            escape(versioned(task)),
            f"[{_COLOURS.get(TaskState(state), 'default')}]{state}[/]",
            str(task["attempts"]),
            when(task["accepted_at"]),
        )
    print_table(table, "No tasks.")


@tasks.command("show")
@task_argument
@json_option
@url_option
def show_task(task_id: str, as_json: bool, url: str | None) -> None:
    """Show the state, times and error of a task."""
    with platform(url) as client:
        view = client.task(task_id)
    if as_json:
        print_lines([view])
        return
    error = view.get("error")
    print_facts(
        {
            "task": view["task_id"],
            "model": versioned(view),
            "status": view["status"],
            "error": error and f"{error['code']}: {error['detail']}",
            "attempts": view.get("attempts"),
            "retries": view.get("retries") or None,
            "next try": when(view.get("retry_at")),
            "priority": view.get("priority"),
            "accepted": when(view.get("accepted_at")),
            "started": when(view.get("started_at")),
            "finished": when(view.get("finished_at")),
            "batch": view.get("batch_id"),
            "repeats": view.get("replay_of"),
        }
    )
    if "outputs" in view:
        out.print(f"  `inferno watch {view['task_id']}` prints the outputs.", soft_wrap=True)


@tasks.command()
@click.argument("task_ids", nargs=-1, required=True, metavar="TASK_ID...")
@url_option
def cancel(task_ids: Sequence[str], url: str | None) -> None:
    """Cancel tasks; the result of a running task is discarded."""
    with platform(url) as client:
        for task_id in task_ids:
            client.cancel(task_id)
            out.print(f"Cancelled {task_id}.", soft_wrap=True)


@tasks.command()
@task_argument
@url_option
def retry(task_id: str, url: str | None) -> None:
    """Run a finished task again, as a new task, and print its id.

    The task's inputs must have been kept, see INFERNO_TASKS__KEEP_PAYLOADS.
    """
    with platform(url) as client:
        click.echo(client.retry(task_id).id)
