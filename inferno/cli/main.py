"""The `inferno` command.

`up`, `worker`, `models`, `tune`, `simulate`, `doctor` and `settings` work on the project's
directory and this machine's environment; the others use a running platform through its HTTP API,
from anywhere.
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
