"""The terminal output of `inferno up`.

A thread of the screen watches the platform start; the supervisor's events come from its own thread.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from inferno.errors import InfernoError
from inferno.operate.addresses import local_client, local_url
from inferno.operate.embedded_redis import EmbeddedRedis, password_path
from inferno.operate.examples import example_call
from inferno.operate.guard import Event, EventKind
from inferno.repository.repository import Repository
from inferno.settings import Settings, exposure
from inferno.version import inferno_version


class Screen:
    """Shows each part of the platform when it is ready, then how to use the platform."""

    #: Time between two checks of the starting platform, in seconds.
    LOOK_S = 0.25
    #: After this many seconds, a start is slow and the log files are pointed out.
    SLOW_S = 60.0

    def __init__(
        self,
        console: Console,
        settings: Settings,
        models: Sequence[str],
        broken: Mapping[str, str],
        *,
        flower: bool,
    ) -> None:
        """Store what to show.

        Args:
          console: the terminal.
          settings: settings of the platform.
          models: names of the models that have a worker.
          broken: why other models cannot be served, by name.
          flower: whether Flower runs.
        """
        self._console = console
        self._settings = settings
        self._models = models
        self._broken = dict(broken)
        self._flower = flower
        #: The embedded server; None when Redis runs elsewhere.
        self.redis: EmbeddedRedis | None = None
        self._url = local_url(settings)
        self._started_at = time.monotonic()
        self._died: set[str] = set()
        self._failed: set[str] = set()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="screen", daemon=True)
        self._status: Status | None = None

    def __enter__(self) -> Screen:
        count = f"{len(self._models)} model{'' if len(self._models) == 1 else 's'}"
        self._console.print(f"[bold]Inferno {inferno_version()}[/] is starting with {count}.")
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._watcher.join(timeout=5)

    def show(self, event: Event) -> None:
        """Show an event of the supervisor, unless it is routine."""
        if event.kind is EventKind.STARTED:
            if event.process == "redis" and self.redis:
                self._introduce(self.redis)
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
            # A second death usually has the same reason.
            lines = () if event.process in self._died else event.log_lines
            self._died.add(event.process)
            event = Event(event.kind, event.process, event.message, event.level, lines)
        self._console.print(
            event.text(colour=False), markup=False, soft_wrap=True, style=_style(event)
        )

    def welcome(self, model: str) -> None:
        """Show that a model was added to the repository."""
        self._tell(model, "was added to the repository; its worker is starting")

    def _introduce(self, redis: EmbeddedRedis) -> None:
        if redis.address is None:
            self._tell("redis", f"{redis.program}, for this user only")
            return
        host, port = redis.address
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        elif ":" in host:
            host = f"[{host}]"
        self._tell("redis", f"{redis.program}, port {port}, with a password. Other clients need")
        password = shlex.quote(str(password_path(self._settings.data.dir)))
        url = f'"redis://:$(cat {password})@{host}:{port}/0"'
        self._console.print(
            f"    {escape(f'export INFERNO_REDIS__URL={url}')}", soft_wrap=True, highlight=False
        )

    def _tell(self, part: str, message: str) -> None:
        self._console.print(f"  [green]✓[/] {escape(part):<12} {escape(message)}", soft_wrap=True)

    def _watch(self) -> None:
        """Watch the start until each model is ready or has failed."""
        waiting = list(self._models)
        with ExitStack() as stack:
            client = stack.enter_context(local_client(self._settings))
            if self._console.is_terminal:
                self._status = stack.enter_context(self._console.status("Starting the front end"))
            answered = reminded = False
            while not self._stopping.wait(self.LOOK_S):
                if not reminded and time.monotonic() - self._started_at > self.SLOW_S:
                    self._remind(waiting if answered else ["web"])
                    reminded = True
                try:
                    models = client.models()
                except InfernoError:
                    continue
                if not answered:
                    self._tell("web", self._url)
                    answered = True
                for model in models:
                    name = model["name"]
                    if name in waiting and model["ready"]:
                        self._tell(name, f"ready after {time.monotonic() - self._started_at:.1f} s")
                        waiting.remove(name)
                    elif name in waiting and model.get("failed_versions"):
                        self._broken[name] = "; ".join(model["failed_versions"].values())
                        waiting.remove(name)
                waiting = [name for name in waiting if name not in self._failed]
                if not waiting:
                    break
                if self._status is not None:
                    self._status.update(f"Loading {', '.join(waiting)}")
        if not self._stopping.is_set():
            self._summarise(sorted(set(self._models) - self._failed - self._broken.keys()))

    def _remind(self, late: Sequence[str]) -> None:
        logs = self._settings.data.dir / "logs"
        names = escape(", ".join(late))
        self._console.print(
            f"  [yellow]![/] Still waiting for {names}; see the logs in {logs}", soft_wrap=True
        )

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
        lines += [f"  [yellow]Warning     {escape(warning)}[/]" for warning in self._exposures()]
        for name, reason in self._broken.items():
            lines += [f"  [red]Not served  {escape(name)}: {escape(reason)}[/]"]
        for name in sorted(self._failed):
            log = logs / f"worker-{name}.log"
            lines += [f"  [red]Failing     {escape(name)}; see {escape(str(log))}[/]"]
        if ready:
            lines += ["", "Try it:", "", f"  {escape(self._example(ready))}"]
        lines += ["", "Press Ctrl-C to stop."]
        self._console.print("\n".join(lines), soft_wrap=True)

    def _exposures(self) -> Iterator[str]:
        """Yield a warning for each server that others than this machine can reach."""
        servers = [("The front end", self._settings.server.host, self._settings.server.port)]
        if self._flower:
            servers += [("Flower", self._settings.flower.host, self._settings.flower.port)]
        yield from filter(None, (exposure(*server) for server in servers))

    def _example(self, ready: Sequence[str]) -> str:
        """Return a command that calls one of the ready models."""
        repository = Repository.read(self._settings.repository)
        # Prefer a model that takes text, which is readable in a terminal.
        name = min(ready, key=lambda name: (name != "sentiment", not _takes_text(repository, name)))
        return example_call(self._url, repository.model(name).package())


def _takes_text(repository: Repository, name: str) -> bool:
    return any(spec.dtype == "string" for spec in repository.model(name).package().signature.inputs)


def _style(event: Event) -> str:
    return {"info": "", "warning": "yellow", "error": "red"}[event.level]


@contextmanager
def own_terminal() -> Iterator[None]:
    """Make Ctrl-C reach this process only, and not a wrapper such as make.

    An interrupted make ends with an error, even if its command stops cleanly.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        yield
        return
    group = os.getpgrp()
    try:
        # A shell with job control has done this already. In the background, the terminal belongs to
        # another process.
        if group == os.getpid() or os.tcgetpgrp(terminal) != group:
            yield
            return
        # Taking the terminal and giving it back counts as writing to it from the background.
        previous = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        # After Ctrl-Z nothing would wake this process: the shell only knows make.
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
