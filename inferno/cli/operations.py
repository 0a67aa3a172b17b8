"""The commands for those who run a platform: tasks, dead letters, lanes and cache, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import click
from rich.markup import escape

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
from inferno.client import Client
from inferno.operate.addresses import local_url
from inferno.protocol.tasks import TaskState
from inferno.settings import load

url_option = click.option("--url", help="Of the platform; default: as the settings say.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_model_option = click.option("--model", help="Of this model alone.")
_limit_option = click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="Print at most so many."
)
_yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
_task_argument = click.argument("task_id")
_tasks_argument = click.argument("task_ids", nargs=-1, metavar="[TASK_ID]...")

#: How the states are shown.
_COLOURS = {
    TaskState.RUNNING: "cyan",
    TaskState.RETRYING: "yellow",
    TaskState.SUCCEEDED: "green",
    TaskState.FAILED: "red",
    TaskState.EXPIRED: "red",
    TaskState.CANCELLED: "dim",
}


class InOrder(click.Group):
    """Lists commands as they are needed, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names."""
        return list(self.commands)


@contextmanager
def platform(url: str | None) -> Iterator[Client]:
    """Connect to the platform at a URL, or to that of the settings."""
    with Client(url or local_url(load())) as client:
        yield client


# -- Tasks -----------------------------------------------------------------------------------------


@click.group(cls=InOrder)
def tasks() -> None:
    """List, show, cancel and retry tasks."""


@tasks.command("list")
@click.option(
    "--status",
    multiple=True,
    type=click.Choice(list(map(str, TaskState))),
    help="Of this state; may be repeated.",
)
@_model_option
@_limit_option
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
@_task_argument
@json_option
@url_option
def show_task(task_id: str, as_json: bool, url: str | None) -> None:
    """Show what is known of a task."""
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
    """Take tasks back; the result of one that runs is discarded."""
    with platform(url) as client:
        for task_id in task_ids:
            client.cancel(task_id)
            out.print(f"Cancelled {task_id}.", soft_wrap=True)


@tasks.command()
@_task_argument
@url_option
def retry(task_id: str, url: str | None) -> None:
    """Run a finished task again, as a new one, and print its id.

    What it was asked must have been kept: INFERNO_TASKS__KEEP_PAYLOADS says of which tasks it is.
    """
    with platform(url) as client:
        click.echo(client.retry(task_id).id)


# -- Dead letters ----------------------------------------------------------------------------------


@click.group(cls=InOrder)
def dead() -> None:
    """List, show, replay and discard tasks that were given up."""


@dead.command("list")
@_model_option
@_limit_option
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
        out.print(f"{count} in all.")


@dead.command("show")
@_task_argument
@json_option
@url_option
def show_dead(task_id: str, as_json: bool, url: str | None) -> None:
    """Show why a task was given up, and what it was asked."""
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
    out.print(f"\nIt was asked\n  {escape(json.dumps(letter['payload']))}", soft_wrap=True)


@dead.command()
@_tasks_argument
@click.option("--all", "everything", is_flag=True, help="Replay all there are.")
@_model_option
@url_option
def replay(task_ids: Sequence[str], everything: bool, model: str | None, url: str | None) -> None:
    """Run dead tasks again, as new ones, and print their ids.

    Which ones, the ids say, or --all, or --model. Their letters are discarded.
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
            f"{answer['left']} are left: their models are not in the repository any more"
        )


@dead.command()
@_tasks_argument
@click.option("--all", "everything", is_flag=True, help="Discard all there are.")
@_yes_option
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


# -- Lanes -----------------------------------------------------------------------------------------


@click.group(cls=InOrder)
def lanes() -> None:
    """List, pause, resume and purge the lanes of the models."""


@lanes.command("list")
@json_option
@url_option
def list_lanes(as_json: bool, url: str | None) -> None:
    """Show how many tasks wait for each model."""
    with platform(url) as client:
        found = client.lanes()
    if as_json:
        print_lines(found)
        return
    table = new_table("Model", "Waiting", "In hand", "Delayed", "")
    for lane in found:
        counts = (str(lane[name]) for name in ("waiting", "held", "delayed"))
        table.add_row(escape(lane["model"]), *counts, "[yellow]paused[/]" if lane["paused"] else "")
    print_table(table, "No models.")


@lanes.command()
@click.argument("model")
@url_option
def pause(model: str, url: str | None) -> None:
    """Give workers no more tasks of MODEL; they are still accepted."""
    with platform(url) as client:
        client.pause(model)
    out.print(f"Paused {model}; `inferno lanes resume {model}` goes on.", soft_wrap=True)


@lanes.command()
@click.argument("model")
@url_option
def resume(model: str, url: str | None) -> None:
    """Give workers the tasks of MODEL again."""
    with platform(url) as client:
        client.resume(model)
    out.print(f"Resumed {model}.", soft_wrap=True)


@lanes.command()
@click.argument("model")
@_yes_option
@url_option
def purge(model: str, yes: bool, url: str | None) -> None:
    """Cancel the tasks that wait for MODEL.

    Those in workers' hands go on. Asks first, with the number of tasks.
    """
    with platform(url) as client:
        lane = client.lane(model)
        count = lane["waiting"] + lane["delayed"]
        if count and not yes:
            click.confirm(f"Cancel {counted(count, 'task')} of {model}?", abort=True)
        cancelled = client.purge(model, count)
    out.print(f"Cancelled {counted(cancelled, 'task')}.")


# -- The cache -------------------------------------------------------------------------------------


@click.group(cls=InOrder)
def cache() -> None:
    """Show and clear the kept results."""


@cache.command("show")
@json_option
@url_option
def show_cache(as_json: bool, url: str | None) -> None:
    """Show how much is kept, and what it has saved."""
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
@_model_option
@url_option
def clear_cache(model: str | None, url: str | None) -> None:
    """Forget the kept results."""
    with platform(url) as client:
        out.print(f"Cleared {counted(client.clear_cache(model), 'result')}.")
