"""The `inferno` command.

`up`, `worker`, `models`, `tune`, `simulate`, `doctor` and `settings` work on the project's
directory and this machine's environment; the others use a running platform through its HTTP API,
from anywhere.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from inferno.cli import models as models_cli
from inferno.cli import operations, versions
from inferno.cli import tune as experiments
from inferno.cli.operations import InOrder, platform, url_option
from inferno.client import Client, Result
from inferno.engine.cores import Cores
from inferno.errors import (
    ConfigurationError,
    InfernoError,
    InvalidInput,
    ModelNotFound,
    NotConfirmed,
    NotSupported,
    PackageError,
    PayloadGone,
    PlatformUnreachable,
    TaskNotFound,
    WrongState,
)
from inferno.operate import embedded_redis
from inferno.operate.addresses import reach_broker, reach_redis
from inferno.operate.doctor import examine
from inferno.operate.guard import Stage
from inferno.operate.newcomers import Newcomers, servable
from inferno.operate.ports import check_port
from inferno.operate.procfile import enter_project, read_procfile
from inferno.operate.screen import Screen, own_terminal
from inferno.operate.settings_document import (
    documented_settings,
    environment_example,
    settings_markdown,
)
from inferno.operate.supervisor import ProcessSpec, Supervisor
from inferno.protocol.tensors import Array
from inferno.repository.repository import Repository
from inferno.settings import Settings, load, variable
from inferno.version import inferno_version

#: What to do about an error, for those whose message does not say it already.
HINTS: dict[type[InfernoError], str] = {
    ModelNotFound: "`inferno models` lists the models that there are.",
    InvalidInput: "`inferno models show <model>` tells what a model takes.",
    TaskNotFound: "`inferno tasks list` and `inferno dead list` show those that there are.",
    WrongState: "`inferno tasks show <task>` tells where it stands.",
    PayloadGone: "Submit it again with its inputs.",
    NotConfirmed: "It has changed meanwhile; try again. `inferno lanes pause` keeps workers out.",
    NotSupported: "Leave INFERNO_BROKER__URL unset to have lanes on Redis Streams.",
    PlatformUnreachable: "`inferno up` starts the platform; --url says where another one is.",
}

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


class _Failure(click.ClickException):
    """An error as one red line, and a hint."""

    def __init__(self, message: str, hint: str | None) -> None:
        super().__init__(message)
        self.hint = hint

    def show(self, file: Any = None) -> None:
        err.print(f"[red]Error:[/] {escape(self.message)}", soft_wrap=True)
        if self.hint:
            err.print(f"  {escape(self.hint)}", soft_wrap=True)


class _Commands(InOrder):
    """Shows our errors as people want them, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InfernoError as exc:
            raise _Failure(str(exc), HINTS.get(type(exc))) from exc


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    # The character that stops click from filling lines.
    epilog="""\b
Start everything:      inferno up
Ask for something:     inferno submit sentiment "What a lovely day!" --wait
When something fails:  inferno doctor""",
)
@click.version_option(inferno_version(), message="Inferno %(version)s")
def main() -> None:
    """Serve machine-learning models through a durable task queue.

    Every call is a durable job, and every job rides in a well-formed batch.
    """


# -- Serving ---------------------------------------------------------------------------------------


@main.command()
@click.option("--models", "wanted", metavar="A,B", help="Serve only these models.")
@click.option("--flower/--no-flower", default=True, help="Also run Flower, the worker console.")
@click.option("--logs", is_flag=True, help="Also print what the processes log.")
def up(wanted: str | None, flower: bool, logs: bool) -> None:
    """Run the whole platform until Ctrl-C.

    Starts the front end, one worker for each model, Flower, and a Redis server of its own unless
    INFERNO_REDIS__URL names one. A model that comes into the repository later gets a worker, too.
    What dies is started again; Ctrl-C lets running work finish.
    """
    root = enter_project()
    settings = load()
    Cores(settings.inference.cores).leave()
    commands = read_procfile(root)
    if not flower:
        commands.pop("flower", None)
    models, broken = servable(Repository.read(settings.repository), wanted)
    screen = Screen(out, settings, models, broken, flower="flower" in commands)
    supervisor = Supervisor(
        settings.data.dir,
        cwd=root,
        grace_s=settings.worker.grace_s,
        on_event=screen.show,
        follow=logs,
    )
    # Whoever has the data directory has the ports too; said first, because it is the reason.
    supervisor.lock()
    try:
        _check_ports_are_free(settings, flower=flower)
        add_worker = _add_processes(supervisor, commands, models, settings, screen)

        def welcome(model: str) -> None:
            add_worker(model)
            screen.welcome(model)

        newcomers = Newcomers(settings.repository, models, welcome)
        with own_terminal(), screen, newcomers if wanted is None else nullcontext():
            supervisor.run_forever()
    finally:
        # Gives the lock back where nothing was started.
        supervisor.stop()
    out.print("Stopped.")


def _check_ports_are_free(settings: Settings, *, flower: bool) -> None:
    check_port(settings.server.host, settings.server.port, variable("server", "port"))
    if flower:
        check_port(settings.flower.host, settings.flower.port, variable("flower", "port"))


def _add_processes(
    supervisor: Supervisor,
    commands: Mapping[str, str],
    models: Sequence[str],
    settings: Settings,
    screen: Screen,
) -> Callable[[str], None]:
    """Tell the supervisor what to run: the Procfile, its worker line once for each model.

    Returns:
      What adds a worker of one more model.
    """
    environment = {}
    if settings.broker.scheme in ("amqp", "amqps"):
        # A Redis that is a broker too may be ours, which is not started yet.
        reach_broker(settings)
    if settings.redis.url is not None:
        reach_redis(settings.redis)
    else:
        redis = embedded_redis.prepare(
            settings.data.dir, port=settings.redis.port, appendfsync=settings.redis.fsync
        )
        environment[variable("redis", "url")] = redis.url
        screen.redis = f"{redis.program}, port {redis.port}"
        supervisor.add(
            ProcessSpec(
                "redis", redis.command, stage=Stage.STORE, wait_until_ready=redis.wait_until_ready
            )
        )
    for name, command in commands.items():
        if name != "worker":
            stage = Stage.WORKER if name == "webhooks" else Stage.FRONT_END
            supervisor.add(ProcessSpec(name, command, environment, stage))

    def add_worker(model: str) -> None:
        named = environment | {variable("worker", "model_name"): model}
        supervisor.add(ProcessSpec(f"worker-{model}", commands["worker"], named, Stage.WORKER))

    for model in models:
        add_worker(model)
    return add_worker


@main.command()
@click.argument("model")
def worker(model: str) -> None:
    """Run one more worker for MODEL, in the foreground.

    It takes tasks from the lane of the model beside the workers that are there already. Without
    INFERNO_REDIS__URL it joins the platform that runs on this data directory.
    """
    root = enter_project()
    settings = load()
    repository = Repository.read(settings.repository)
    if model in repository.errors:
        raise PackageError(repository.errors[model])
    repository.model(model)
    url = settings.redis.url or embedded_redis.running_url(settings.data.dir)
    if url is None:
        raise ConfigurationError(
            f"No platform runs on {settings.data.dir.resolve()}. Start one with `inferno up`, or "
            f"set {variable('redis', 'url')} to the Redis of another."
        )
    own_bin = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)]),
        variable("redis", "url"): url,
        variable("worker", "model_name"): model,
    }
    command = f"exec env {read_procfile(root)['worker']}"
    os.execve("/bin/sh", ["/bin/sh", "-c", command], environment)


# -- Models ----------------------------------------------------------------------------------------


main.add_command(models_cli.models)
main.add_command(experiments.tune)
main.add_command(experiments.simulate)


# -- Using a running platform ----------------------------------------------------------------------


@main.command(
    epilog="""\b
inferno submit sentiment "What a lovely day!" --wait
inferno submit digits @seven.png --wait --json"""
)
@click.argument("model")
@click.argument("value", metavar="TEXT|@FILE|-")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--version", type=int, help="Of the model; default: the active one.")
@click.option("--priority", type=click.IntRange(0, 9), default=0, help="Higher is sooner.")
@click.option("--timeout-ms", type=float, help="The forward pass must start within it.")
@click.option("--webhook", metavar="URL", help="To be called when the task is over.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON as the platform sent it.")
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

    The input is the TEXT itself, the content of a file (@FILE) or of the standard input (-). JSON
    objects are inputs by name, JSON lists are numbers; what is no text is sent as an image.
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


@main.command()
@click.argument("task_ids", nargs=-1, required=True, metavar="TASK_ID...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON as the platform sent it.")
@url_option
def watch(task_ids: tuple[str, ...], as_json: bool, url: str | None) -> None:
    """Print the results of tasks as they arrive.

    All come over one WebSocket. The exit code is 1 when one of the tasks has failed.
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


main.add_command(operations.tasks)
main.add_command(operations.dead)
main.add_command(operations.lanes)
main.add_command(versions.versions)
main.add_command(operations.cache)


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
    # Editors and `echo` end files with a newline, which is no part of the text.
    return text.removesuffix("\n")


def _print_result(client: Client, task_id: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(client.result(task_id, float("inf")).raw))
        return
    # The status line is for people and must not stand in what is piped on.
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
    """Return an output for people: short ones whole, of long ones the beginning."""
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


# -- This machine ----------------------------------------------------------------------------------


@main.command()
@click.option("--markdown", "form", flag_value="markdown", help="Print docs/settings.md.")
@click.option("--env", "form", flag_value="env", help="Print .env.example.")
def settings(form: str | None) -> None:
    """List every setting with its value, its default and its meaning."""
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


@main.command()
def doctor() -> None:
    """Check this machine, the installation and, when it runs, the platform.

    The exit code is 1 when something is found that keeps Inferno from working.
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
