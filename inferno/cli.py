"""The `inferno` command.

`up`, `worker`, `models`, `doctor` and `settings` work on the project's directory and this machine's
environment; `submit` and `watch` use a running platform through its HTTP API, from anywhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import click
from packaging.requirements import Requirement
from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from inferno import embedded_redis
from inferno.client import Client, Result
from inferno.errors import (
    ConfigurationError,
    InfernoError,
    InvalidInput,
    ModelNotFound,
    PackageError,
    ServingError,
)
from inferno.guard import Event, EventKind, Stage
from inferno.ports import check_port
from inferno.protocol.signature import TensorSpec
from inferno.protocol.tensors import Array
from inferno.repository import Package, Repository
from inferno.settings import RedisSettings, Settings, load, variable
from inferno.supervisor import ProcessSpec, Supervisor, parse_procfile

#: What to do about an error, for those whose message does not say it already.
HINTS: dict[type[InfernoError], str] = {
    ModelNotFound: "`inferno models` lists the models that there are.",
    InvalidInput: "`inferno models show <model>` tells what a model takes.",
    ServingError: "`inferno up` starts the platform; --url says where another one is.",
}

#: The sentence of the examples.
SAMPLE_TEXT = "What a lovely day!"

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


class _Commands(click.Group):
    """Shows our errors as people want them, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        # As they are needed, not by the alphabet.
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InfernoError as exc:
            raise _Failure(str(exc), HINTS.get(type(exc))) from exc


def _version() -> str:
    try:
        return importlib.metadata.version("inferno")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    # The character that stops click from filling lines.
    epilog="""\b
Start everything:      inferno up
Ask for something:     inferno submit sentiment "What a lovely day!" --wait
When something fails:  inferno doctor""",
)
@click.version_option(_version(), message="Inferno %(version)s")
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
    INFERNO_REDIS__URL names one. What dies is started again; Ctrl-C lets running work finish.
    """
    root = enter_project()
    settings = load()
    commands = _procfile(root)
    if not flower:
        commands.pop("flower", None)
    models, broken = _servable(Repository.read(settings.repository), wanted)
    screen = Screen(settings, models, broken, flower="flower" in commands)
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
        _add_processes(supervisor, commands, models, settings, screen)
        with own_terminal(), screen:
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
) -> None:
    """Tell the supervisor what to run: the Procfile, its worker line once for each model."""
    environment = {}
    if settings.redis.url is not None:
        _reach_redis(settings.redis)
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
            supervisor.add(ProcessSpec(name, command, environment, Stage.FRONT_END))
    for model in models:
        named = environment | {variable("worker", "model_name"): model}
        supervisor.add(ProcessSpec(f"worker-{model}", commands["worker"], named, Stage.WORKER))


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
    command = f"exec env {_procfile(root)['worker']}"
    os.execve("/bin/sh", ["/bin/sh", "-c", command], environment)


def _reach_redis(settings: RedisSettings) -> str:
    """Return the address of the Redis that the settings name.

    Raises:
      ConfigurationError: nothing listens there.
    """
    parts = urlsplit(settings.url or "")
    try:
        address = (parts.hostname or "127.0.0.1", parts.port or 6379)
        socket.create_connection(address, timeout=settings.connect_timeout_s).close()
    except (OSError, ValueError) as exc:
        # The whole URL may hold a password.
        raise ConfigurationError(
            f"{variable('redis', 'url')}: {parts.hostname} cannot be reached: {exc}"
        ) from None
    return f"{address[0]}:{address[1]}"


def enter_project() -> Path:
    """Go to the project's directory, which relative paths of settings start from.

    It is the nearest one upwards with a Procfile, else the one that this file belongs to.
    """
    here = Path.cwd()
    home = Path(__file__).resolve().parents[1]
    root = next((path for path in (here, *here.parents, home) if _is_project(path)), here)
    os.chdir(root)
    return root


def _is_project(path: Path) -> bool:
    return (path / "Procfile").is_file() and (path / "celeryconfig.py").is_file()


def _procfile(root: Path) -> dict[str, str]:
    file = root / "Procfile"
    if not file.is_file():
        raise ConfigurationError(f"{root} has no Procfile; run this in Inferno's own directory.")
    return parse_procfile(file.read_text())


def _servable(repository: Repository, wanted: str | None) -> tuple[list[str], dict[str, str]]:
    """Choose the models to start workers for.

    Args:
      repository: the models that there are.
      wanted: names with commas; None for all.

    Returns:
      The names, and what is wrong with the other models.

    Raises:
      InfernoError: one that was asked for by name cannot be served.
    """
    broken = dict(repository.errors)
    for name, model in repository.models.items():
        path = _missing_artifact(model.package())
        if path is not None:
            broken[name] = f"{path} is missing; make it with `inferno models prepare {name}`"
    if wanted is None:
        return [name for name in repository.models if name not in broken], broken
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    for name in names:
        if name in broken:
            raise PackageError(broken[name])
        repository.model(name)
    return names, {}


def _missing_artifact(package: Package) -> Path | None:
    artifact = package.manifest.artifact
    if artifact is None or (package.path / artifact).is_file():
        return None
    return package.path / artifact


class Screen:
    """What `inferno up` shows: each part as it gets ready, then how to use the platform."""

    #: Time between two looks at the platform while it starts, in seconds.
    LOOK_S = 0.25
    #: A start that takes longer is worth a word about where to look.
    SLOW_S = 60.0

    def __init__(
        self, settings: Settings, models: Sequence[str], broken: Mapping[str, str], *, flower: bool
    ) -> None:
        """Store what is started.

        Args:
          settings: of the platform.
          models: that have a worker.
          broken: what is wrong with the others, by model.
          flower: whether it runs too.
        """
        self._settings = settings
        self._models = models
        self._broken = broken
        self._flower = flower
        #: Which server, when it is the platform's own.
        self.redis: str | None = None
        self._url = local_url(settings)
        self._started_at = time.monotonic()
        self._died: set[str] = set()
        self._failed: set[str] = set()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="screen", daemon=True)
        self._status: Status | None = None

    def __enter__(self) -> Screen:
        count = f"{len(self._models)} model{'' if len(self._models) == 1 else 's'}"
        out.print(f"[bold]Inferno {_version()}[/] starts with {count}.")
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._watcher.join(timeout=5)

    def show(self, event: Event) -> None:
        """Show an event of the supervisor, unless it is business as usual."""
        if event.kind is EventKind.STARTED:
            if event.process == "redis" and self.redis:
                self._tell("redis", self.redis)
                self.redis = None
            return
        if event.kind is EventKind.STOPPED:
            return
        if event.kind is EventKind.STOPPING:
            self._stopping.set()
            if self._status is not None:
                self._status.stop()
        if event.kind is EventKind.FAILING:
            self._failed.add(event.process.removeprefix("worker-"))
        if event.kind is EventKind.DIED:
            # A second death has the same reason, as a rule.
            lines = () if event.process in self._died else event.log_lines
            self._died.add(event.process)
            event = Event(event.kind, event.process, event.message, event.level, lines)
        out.print(event.text(colour=False), markup=False, soft_wrap=True, style=_style(event))

    def _tell(self, part: str, message: str) -> None:
        out.print(f"  [green]✓[/] {escape(part):<12} {escape(message)}", soft_wrap=True)

    def _watch(self) -> None:
        """Follow the start until every model is ready or known to fail."""
        waiting = list(self._models)
        with ExitStack() as stack:
            client = stack.enter_context(Client(self._url))
            if out.is_terminal:
                self._status = stack.enter_context(out.status("Starting the front end"))
            answered = reminded = False
            while not self._stopping.wait(self.LOOK_S):
                if not reminded and time.monotonic() - self._started_at > self.SLOW_S:
                    self._remind(waiting if answered else ["web"])
                    reminded = True
                try:
                    ready = {model["name"] for model in client.models() if model["ready"]}
                except InfernoError:
                    continue
                if not answered:
                    self._tell("web", self._url)
                    answered = True
                for name in [name for name in waiting if name in ready]:
                    self._tell(name, f"ready after {time.monotonic() - self._started_at:.1f} s")
                    waiting.remove(name)
                waiting = [name for name in waiting if name not in self._failed]
                if not waiting:
                    break
                if self._status is not None:
                    self._status.update(f"Loading {', '.join(waiting)}")
        if not self._stopping.is_set():
            self._summarise(sorted(set(self._models) - self._failed))

    def _remind(self, late: Sequence[str]) -> None:
        logs = self._settings.data.dir / "logs"
        names = escape(", ".join(late))
        out.print(f"  [yellow]![/] Still waiting for {names}; its log is in {logs}", soft_wrap=True)

    def _summarise(self, ready: Sequence[str]) -> None:
        logs = self._settings.data.dir / "logs"
        lines = [
            "",
            "[bold green]Inferno is up.[/]" if ready else "[bold]No model is ready.[/]",
            "",
        ]
        lines += [f"  Front page  {escape(self._url)}"]
        if self._flower:
            lines += [f"  Flower      {escape(self._settings.flower_url)}"]
        lines += [f"  Models      {escape(', '.join(ready) or 'none')}"]
        lines += [f"  Logs        {escape(str(logs))}"]
        for name, reason in self._broken.items():
            lines += [f"  [red]Not served  {escape(name)}: {escape(reason)}[/]"]
        for name in sorted(self._failed):
            log = logs / f"worker-{name}.log"
            lines += [f"  [red]Failing     {escape(name)}; see {escape(str(log))}[/]"]
        if ready:
            lines += ["", "Try it:", "", f"  {escape(self._example(ready))}"]
        lines += ["", "Ctrl-C stops everything."]
        out.print("\n".join(lines), soft_wrap=True)

    def _example(self, ready: Sequence[str]) -> str:
        """Return a command that submits something to one of the models and shows the result."""
        repository = Repository.read(self._settings.repository)
        # Text is short enough to be read in a terminal.
        name = min(ready, key=lambda name: (name != "sentiment", not _takes_text(repository, name)))
        body = json.dumps({"inputs": _sample(repository.model(name).package())})
        return f"curl {self._url}/v1/models/{name}:predict -d {shlex.quote(body)}"


def _takes_text(repository: Repository, name: str) -> bool:
    return any(spec.dtype == "string" for spec in repository.model(name).package().signature.inputs)


def _sample(package: Package) -> dict[str, Any]:
    for spec in package.signature.inputs:
        if spec.dtype == "string":
            return {spec.name: SAMPLE_TEXT}
    return package.manifest.warm_up.inputs or {}


def _style(event: Event) -> str:
    return {"info": "", "warning": "yellow", "error": "red"}[event.level]


def local_url(settings: Settings) -> str:
    """Return where the platform of these settings is reached from this machine."""
    host = settings.server.host
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{settings.server.port}"


@contextmanager
def own_terminal() -> Iterator[None]:
    """Become what Ctrl-C is for, where a wrapper such as make would get it too.

    make ends with an error when it is interrupted, however well its command stops.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        yield
        return
    group = os.getpgrp()
    try:
        # A shell with job control has done it already; in the background, the terminal is others'.
        if group == os.getpid() or os.tcgetpgrp(terminal) != group:
            yield
            return
        # To take the terminal, and to give it back, is to write to it from the background.
        previous = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        # Nobody would wake us: the shell knows make only.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpgrp())
        try:
            yield
        finally:
            with suppress(OSError):
                os.tcsetpgrp(terminal, group)
            signal.signal(signal.SIGTTOU, previous)
    finally:
        os.close(terminal)


# -- Models ----------------------------------------------------------------------------------------


@main.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List the models of the repository; see also the commands below."""
    if ctx.invoked_subcommand is not None:
        return
    enter_project()
    settings = load()
    repository = Repository.read(settings.repository)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Model", "Versions", "Task", "Format", "Description"):
        table.add_column(title, overflow="fold" if title == "Description" else "ignore")
    for model in repository.models.values():
        manifest = model.package().manifest
        versions = [
            f"[bold]{v}[/]" if v == model.active else str(v) for v in sorted(model.versions)
        ]
        description = escape(manifest.description)
        if _missing_artifact(model.package()):
            description = "[yellow]not prepared;[/] " + description
        table.add_row(
            f"[bold]{model.name}[/]",
            ", ".join(versions),
            manifest.task,
            manifest.format,
            description,
        )
    out.print(table)
    problems = dict(repository.errors)
    for model in repository.models.values():
        problems |= {f"{model.name} version {v}": reason for v, reason in model.errors.items()}
    for name, reason in problems.items():
        out.print(f"[red]{escape(name)} cannot be served:[/] {escape(reason)}", soft_wrap=True)


@models.command()
@click.argument("names", nargs=-1)
def prepare(names: tuple[str, ...]) -> None:
    """Make the artifacts of models that are missing or out of date.

    Runs the `prepare.py` of each of NAMES, by default of every model that has one.
    """
    enter_project()
    root = load().repository.root
    if not root.is_dir():
        raise PackageError(f"no model repository at {root}")
    scripts = {path.parent.name: path for path in sorted(root.glob("*/prepare.py"))}
    for name in names:
        if not (root / name).is_dir():
            raise ModelNotFound(f"there is no model {name!r} in {root}")
        if name not in scripts:
            out.print(f"{escape(name)}: nothing to prepare", soft_wrap=True)
    failed = [
        name
        for name, script in scripts.items()
        if (not names or name in names)
        and subprocess.run([sys.executable, str(script)], check=False).returncode != 0
    ]
    if failed:
        raise PackageError(f"could not prepare {', '.join(failed)}; the reason stands above")


@models.command()
@click.argument("name")
def show(name: str) -> None:
    """Show what a model takes and gives, and how it is batched."""
    enter_project()
    settings = load()
    repository = Repository.read(settings.repository)
    if name in repository.errors:
        raise PackageError(repository.errors[name])
    model = repository.model(name)
    package = model.package()
    manifest = package.manifest
    size = manifest.batching.max_batch_size or settings.batching.max_batch_size
    delay_ms = manifest.batching.max_batch_delay_ms
    if delay_ms is None:
        delay_ms = settings.batching.max_batch_delay_ms
    out.print(f"[bold]{name}[/] version {package.version}: {escape(manifest.description)}")
    facts = {
        "versions": ", ".join(map(str, sorted(model.versions))),
        "task": manifest.task,
        "format": manifest.format,
        "package": str(package.path),
        "artifact": "missing" if _missing_artifact(package) else manifest.artifact or "none needed",
        "batches": f"up to {size} rows, the first of which waits at most {delay_ms:g} ms",
        "labels": ", ".join(manifest.labels),
    }
    for title, value in facts.items():
        if value:
            out.print(f"  {title:<9} {escape(value)}", soft_wrap=True)
    for title, specs in (
        ("Inputs", package.signature.inputs),
        ("Outputs", package.signature.outputs),
    ):
        out.print(f"\n{title}")
        for spec in specs:
            out.print(f"  {escape(_describe_spec(spec))}", soft_wrap=True)
    body = json.dumps({"model": name, "inputs": _sample(package)})
    url = local_url(settings)
    out.print(f"\nExample\n  curl {url}/infer -d {escape(shlex.quote(body))}", soft_wrap=True)


def _describe_spec(spec: TensorSpec) -> str:
    shape = ", ".join(map(str, spec.shape))
    optional = ", optional" if spec.optional else ""
    description = f"  {spec.description}" if spec.description else ""
    return f"{spec.name:<12} {spec.dtype} [{shape}]{optional}{description}"


# -- Using a running platform ----------------------------------------------------------------------

_url_option = click.option("--url", help="Of the platform; default: as the settings say.")


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
@click.option("--json", "as_json", is_flag=True, help="Print JSON as the platform sent it.")
@_url_option
def submit(
    model: str,
    value: str,
    wait: bool,
    version: int | None,
    priority: int,
    timeout_ms: float | None,
    as_json: bool,
    url: str | None,
) -> None:
    """Submit one task to MODEL and print its id.

    The input is the TEXT itself, the content of a file (@FILE) or of the standard input (-). JSON
    objects are inputs by name, JSON lists are numbers; what is no text is sent as an image.
    """
    with Client(url or local_url(load())) as client:
        task = client.submit(
            model, _read_input(value), version=version, priority=priority, timeout_ms=timeout_ms
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
@_url_option
def watch(task_ids: tuple[str, ...], as_json: bool, url: str | None) -> None:
    """Print the results of tasks as they arrive.

    All come over one WebSocket. The exit code is 1 when one of the tasks has failed.
    """
    failed = False
    with Client(url or local_url(load())) as client:
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


# -- Settings --------------------------------------------------------------------------------------


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
    for setting in _settings():
        value = getattr(getattr(current, setting.group), setting.field)
        is_default = _format(value) == setting.default
        shown = escape(_format(value))
        out.print(
            f"[bold]{setting.variable}[/] = {shown if is_default else f'[green]{shown}[/]'}"
            f"{'' if is_default else f'  [dim](default: {escape(setting.default)})[/]'}",
            soft_wrap=True,
        )
        out.print(f"    {escape(setting.meaning.replace('`', ''))}", soft_wrap=True)


@dataclass(frozen=True)
class _Setting:
    """One setting as it is documented."""

    group: str
    field: str
    variable: str
    default: str
    meaning: str


def _settings() -> Iterator[_Setting]:
    for group, info in Settings.model_fields.items():
        kind = info.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        for field, detail in kind.model_fields.items():
            default = _format(detail.get_default(call_default_factory=True, validated_data={}))
            yield _Setting(
                group, field, variable(group, field), default, _meaning(group, field, detail)
            )


def _meaning(group: str, field: str, detail: FieldInfo) -> str:
    meaning = detail.description or ""
    if get_origin(detail.annotation) is Literal:
        choices = [f"`{choice}`" for choice in get_args(detail.annotation)]
        meaning += f" One of {', '.join(choices)}."
    if isinstance(detail.validation_alias, AliasChoices):
        others = [str(name) for name in detail.validation_alias.choices if name != field]
        names = [f"`{variable(group, name)}`" for name in others]
        meaning += f" Other names: {', '.join(names)}."
    return meaning


def _format(value: Any) -> str:
    """Return a value as it would stand in the environment."""
    if value is None:
        return "unset"
    if isinstance(value, bool | dict):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_markdown() -> str:
    """Return docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "<!-- Made from inferno/settings.py: `inferno settings --markdown > docs/settings.md` -->",
        "",
        "Every setting is an environment variable, read once when a process starts. A value that",
        "cannot be understood stops the process and is named. `inferno settings` prints the values",
        "that are in force. Paths are relative to the project's directory.",
    ]
    group = ""
    for setting in _settings():
        if setting.group != group:
            group = setting.group
            kind = Settings.model_fields[group].annotation
            assert kind is not None
            lines += ["", f"## {group}", "", kind.__doc__ or "", ""]
            lines += ["| variable | default | meaning |", "|---|---|---|"]
        lines += [f"| `{setting.variable}` | `{setting.default}` | {setting.meaning} |"]
    return "\n".join(lines) + "\n"


def environment_example() -> str:
    """Return .env.example."""
    lines = [
        "# Every setting with its default; made by `inferno settings --env > .env.example`.",
        "# Copy to .env, take the # off what you change, and load it: set -a; . ./.env; set +a",
    ]
    group = ""
    for setting in _settings():
        if setting.group != group:
            group = setting.group
            lines += [""]
        value = "" if setting.default == "unset" else shlex.quote(setting.default)
        lines += [f"# {setting.meaning}", f"#{setting.variable}={value}"]
    return "\n".join(lines) + "\n"


# -- Doctor ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    state: Literal["ok", "warning", "failure"]
    subject: str
    detail: str


@main.command()
def doctor() -> None:
    """Check this machine, the installation and, when it runs, the platform.

    The exit code is 1 when something is found that keeps Inferno from working.
    """
    enter_project()
    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failure": "[red]✗[/]"}
    failures = 0
    for check in CHECKS:
        for finding in check(load()):
            failures += finding.state == "failure"
            line = f"{marks[finding.state]} {finding.subject:<14} {escape(finding.detail)}"
            out.print(line, soft_wrap=True)
    if failures:
        out.print(f"\n{failures} problem{'' if failures == 1 else 's'} found.")
    sys.exit(1 if failures else 0)


def _check_python(_: Settings) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    state: Literal["ok", "failure"] = "ok" if sys.version_info >= (3, 11) else "failure"
    yield Finding(state, "Python", f"{version}, {sys.executable}")


def _check_packages(_: Settings) -> Iterator[Finding]:
    try:
        lines = importlib.metadata.requires("inferno") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warning", "Packages", "Inferno itself is not installed; run `make setup`")
        return
    checked, wrong = 0, []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        checked += 1
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed == "missing" or not requirement.specifier.contains(
            installed, prereleases=True
        ):
            wrong.append(f"{requirement.name} is {installed}, expected {requirement.specifier}")
    if wrong:
        yield Finding("warning", "Packages", f"{'; '.join(wrong)}; `make setup` installs them")
    else:
        yield Finding("ok", "Packages", f"all {checked} as pinned in requirements.txt")


def _check_redis(settings: Settings) -> Iterator[Finding]:
    if settings.redis.url is None:
        try:
            program = embedded_redis.find_program()
        except ConfigurationError as exc:
            yield Finding("failure", "Redis", str(exc))
            return
        yield Finding("ok", "Redis", f"{program}, {program.path}, started by `inferno up`")
        return
    try:
        yield Finding("ok", "Redis", f"{_reach_redis(settings.redis)} accepts connections")
    except ConfigurationError as exc:
        yield Finding("failure", "Redis", str(exc))


def _check_data(settings: Settings) -> Iterator[Finding]:
    folder = settings.data.dir.resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding("failure", "Data directory", f"{folder} cannot be written to")
        return
    status = os.statvfs(existing)
    free_gb = status.f_bavail * status.f_frsize / 1e9
    state: Literal["ok", "warning"] = "ok" if free_gb >= 1 else "warning"
    yield Finding(state, "Data directory", f"{folder}, {free_gb:.0f} GB free")


def _check_models(settings: Settings) -> Iterator[Finding]:
    try:
        repository = Repository.read(settings.repository)
    except PackageError as exc:
        yield Finding("failure", "Models", str(exc))
        return
    for name, reason in repository.errors.items():
        yield Finding("failure", "Models", f"{name}: {reason}")
    for name, model in repository.models.items():
        for version, reason in model.errors.items():
            yield Finding("warning", "Models", f"{name} version {version}: {reason}")
        for package in model.versions.values():
            if missing := _missing_artifact(package):
                advice = f"make it with `inferno models prepare {name}`"
                yield Finding("failure", "Models", f"{missing} is missing; {advice}")
    yield Finding("ok", "Models", ", ".join(repository.models) or "the repository is empty")


def _check_device(settings: Settings) -> Iterator[Finding]:
    # No other command needs the engine, and with a GPU it brings torch.
    from inferno.engine import choose_device

    try:
        device = choose_device(settings.inference.device)
    except PackageError as exc:
        yield Finding("failure", "Device", str(exc))
        return
    yield Finding("ok", "Device", f"{device}, {os.cpu_count()} CPU cores")


def _check_platform(settings: Settings) -> Iterator[Finding]:
    url = local_url(settings)
    with Client(url) as client:
        try:
            health = client.health()
        except ServingError:
            yield from _check_ports(settings)
            return
    detail = f"{url} is {health.get('status')}"
    unserved = [name for name, served in health.get("models", {}).items() if not served]
    if unserved:
        detail += f"; no live worker serves {', '.join(unserved)}"
    if health.get("redis") != "ok":
        yield Finding("failure", "Platform", f"{detail}; it cannot reach Redis")
        return
    workers = health.get("workers_active", 0)
    yield Finding("warning" if unserved else "ok", "Platform", f"{detail}; {workers} workers")


def _check_ports(settings: Settings) -> Iterator[Finding]:
    for name, place in (("server", settings.server), ("flower", settings.flower)):
        try:
            check_port(place.host, place.port, variable(name, "port"))
        except ConfigurationError as exc:
            yield Finding("failure", "Ports", str(exc))
        else:
            yield Finding(
                "ok",
                "Ports",
                f"{place.port} is free for {'the web tier' if name == 'server' else name}",
            )


CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    _check_python,
    _check_packages,
    _check_redis,
    _check_data,
    _check_models,
    _check_device,
    _check_platform,
)
