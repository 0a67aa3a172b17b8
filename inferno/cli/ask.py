"""The commands that call models, over HTTP and WebSocket: `submit` and `watch`."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from inferno.cli.options import platform, url_option
from inferno.cli.printing import err, out
from inferno.client import Client, Result
from inferno.protocol.tensors import Array


@click.command(
    epilog="""\b
inferno submit sentiment "What a lovely day!" --wait
inferno submit digits @seven.png --wait --json"""
)
@click.argument("model")
@click.argument("value", metavar="TEXT|@FILE|-")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--version", type=int, help="Model version (default: the active one).")
@click.option("--priority", type=click.IntRange(0, 9), default=0, help="Higher runs sooner.")
@click.option(
    "--timeout-ms", type=float, help="The forward pass must start within this many milliseconds."
)
@click.option("--webhook", metavar="URL", help="URL to call when the task has finished.")
@click.option("--json", "as_json", is_flag=True, help="Print the platform's JSON.")
@url_option
def submit(
    model: str,
    value: str,
    wait: bool,
    version: int | None,
    priority: int,
    timeout_ms: float | None,
    webhook: str | None,
    as_json: bool,
    url: str | None,
) -> None:
    """Submit one task to MODEL and print its id.

    The input is the TEXT itself, the content of a file (@FILE) or the standard input (-). A JSON
    object gives inputs by name, a JSON list numbers. Content that is not text is sent as an image.
    """
    with platform(url) as client:
        task = client.submit(
            model,
            _read_input(value),
            version=version,
            priority=priority,
            timeout_ms=timeout_ms,
            webhook=webhook,
        )
        if wait:
            _print_result(client, task.id, as_json=as_json)
        elif as_json:
            click.echo(json.dumps({"task_id": task.id, "status": "queued"}))
        else:
            click.echo(task.id)


@click.command()
@click.argument("task_ids", nargs=-1, required=True, metavar="TASK_ID...")
@click.option("--json", "as_json", is_flag=True, help="Print the platform's JSON.")
@url_option
def watch(task_ids: tuple[str, ...], as_json: bool, url: str | None) -> None:
    """Print the results of tasks as they arrive.

    All results arrive over one WebSocket. The exit code is 1 if a task failed.
    """
    failed = False
    with platform(url) as client:
        for result in client.stream(task_ids):
            failed |= result.error is not None
            if as_json:
                click.echo(json.dumps(result.raw))
            else:
                _print_outputs(result)
    sys.exit(1 if failed else 0)


def _read_input(value: str) -> Any:
    if value == "-":
        raw = sys.stdin.buffer.read()
    elif value.startswith("@"):
        try:
            raw = Path(value[1:]).read_bytes()
        except OSError as exc:
            raise click.BadParameter(f"{value[1:]} cannot be read: {exc.strerror}") from None
    else:
        raw = value.encode(errors="surrogateescape")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return raw
    if text.lstrip().startswith(("{", "[")):
        with suppress(ValueError):
            return json.loads(text)
    # Editors and `echo` add a newline that is not part of the text.
    return text.removesuffix("\n")


def _print_result(client: Client, task_id: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(client.result(task_id, float("inf")).raw))
        return
    # The status line goes to stderr, so that piped output does not contain it.
    with err.status(f"Waiting for task {task_id}"):
        result = client.result(task_id, float("inf"))
    _print_outputs(result)


def _print_outputs(result: Result) -> None:
    out.print(f"[bold]{escape(result.model)}[/] {result.task_id}", soft_wrap=True)
    if result.error is not None:
        out.print(f"  [red]{result.status}:[/] {escape(str(result.error))}", soft_wrap=True)
    for name, array in result.outputs.items():
        out.print(f"  {escape(name):<12} {escape(_describe_array(array))}", soft_wrap=True)
    timings = result.raw.get("timings")
    if timings:
        shares = [f"{name.removesuffix('_ms')} {ms:.1f} ms" for name, ms in timings.items()]
        rows = result.raw["batch"]["rows"]
        out.print(f"  [dim]{', '.join(shares)}; batch of {rows} rows[/]", soft_wrap=True)


def _describe_array(array: Array, most: int = 12) -> str:
    """Describe an output for people: all items of a short one, the first items of a long one."""
    items = [_describe_item(item) for item in array.ravel()[:most].tolist()]
    if array.size == 1:
        return items[0]
    if array.size <= most:
        return ", ".join(items)
    return f"{array.dtype} {list(array.shape)}: {', '.join(items[:6])}, …"


def _describe_item(item: Any) -> str:
    if isinstance(item, bytes):
        return f"{len(item)} bytes"
    return f"{item:.4g}" if isinstance(item, float) else str(item)
