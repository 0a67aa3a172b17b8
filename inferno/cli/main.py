"""The `inferno` command.

`up`, `worker`, `models`, `tune`, `simulate`, `settings` and `doctor` use the project's directory
and this machine's environment. The other commands call a running platform over HTTP, from any
machine.
"""

from __future__ import annotations

from typing import Any

import click
from rich.markup import escape

from inferno.cli import ask, cache, dead, lanes, models, settings, tasks, tune, up, versions
from inferno.cli.options import InOrder
from inferno.cli.printing import err
from inferno.errors import (
    InfernoError,
    InvalidInput,
    ModelNotFound,
    NotConfirmed,
    NotSupported,
    PayloadGone,
    PlatformUnreachable,
    TaskNotFound,
    WrongState,
)
from inferno.version import inferno_version

#: Advice on errors whose message does not give it.
HINTS: dict[type[InfernoError], str] = {
    ModelNotFound: "`inferno models` lists the models.",
    InvalidInput: "`inferno models show <model>` shows the inputs of a model.",
    TaskNotFound: "`inferno tasks list` and `inferno dead list` show the known tasks.",
    WrongState: "`inferno tasks show <task>` shows the state of a task.",
    PayloadGone: "Submit the task again with its inputs.",
    NotConfirmed: "The number has just changed; try again. `inferno lanes pause` pauses a lane.",
    NotSupported: "Unset INFERNO_BROKER__URL to use lanes on Redis Streams.",
    PlatformUnreachable: "`inferno up` starts the platform; --url names another one.",
}


class _Failure(click.ClickException):
    """An error, shown as one red line and a hint."""

    def __init__(self, message: str, hint: str | None) -> None:
        super().__init__(message)
        self.hint = hint

    def show(self, file: Any = None) -> None:
        err.print(f"[red]Error:[/] {escape(self.message)}", soft_wrap=True)
        if self.hint:
            err.print(f"  {escape(self.hint)}", soft_wrap=True)


class _Commands(InOrder):
    """Shows errors of Inferno without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InfernoError as exc:
            raise _Failure(str(exc), HINTS.get(type(exc))) from exc


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    # \b keeps click from rewrapping the lines.
    epilog="""\b
Start the platform:    inferno up
Call a model:          inferno submit sentiment "What a lovely day!" --wait
Find out what fails:   inferno doctor""",
)
@click.version_option(inferno_version(), message="Inferno %(version)s")
def main() -> None:
    """Serve machine-learning models through a durable task queue.

    Every call is a durable task, and tasks share forward passes in batches.
    """


for command in (
    up.up,
    up.worker,
    models.models,
    tune.tune,
    tune.simulate,
    ask.submit,
    ask.watch,
    tasks.tasks,
    dead.dead,
    lanes.lanes,
    versions.versions,
    cache.cache,
    settings.settings,
    settings.doctor,
):
    main.add_command(command)
