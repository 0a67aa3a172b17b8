"""The commands that run a platform on this machine: `up` and `worker`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import click
from rich.markup import escape

from inferno.cli.printing import err, out
from inferno.engine.cores import Cores
from inferno.errors import (
    ConfigurationError,
    PackageError,
)
from inferno.operate import embedded_redis
from inferno.operate.addresses import reach_broker, reach_redis
from inferno.operate.guard import Stage
from inferno.operate.misspelled import misspelled
from inferno.operate.newcomers import Newcomers, servable
from inferno.operate.ports import check_port
from inferno.operate.procfile import enter_project, read_procfile
from inferno.operate.screen import Screen, own_terminal
from inferno.operate.supervisor import ProcessSpec, Supervisor
from inferno.repository.repository import Repository
from inferno.settings import Settings, load, variable


@click.command()
@click.option("--models", "chosen", metavar="A,B", help="Serve only these models.")
@click.option("--flower/--no-flower", default=True, help="Also run Flower, the worker console.")
@click.option("--logs", is_flag=True, help="Also print the logs of all processes.")
def up(chosen: str | None, flower: bool, logs: bool) -> None:
    """Run the whole platform until Ctrl-C.

    Starts the front end, one worker for each model, Flower, and a Redis server unless
    INFERNO_REDIS__URL names one. A model that is added to the repository later also gets a worker.
    Processes that die are restarted. Ctrl-C lets running work finish.
    """
    root = enter_project()
    settings = load()
    settings.server.check_certificate()
    # All files that the platform writes are its user's only.
    os.umask(0o077)
    Cores(settings.inference.cores).leave()
    for sentence in misspelled(os.environ):
        err.print(f"[yellow]Warning:[/] {escape(sentence)}", soft_wrap=True)
    commands = read_procfile(root)
    if not flower:
        commands.pop("flower", None)
    models, broken = servable(Repository.read(settings.repository), chosen)
    screen = Screen(out, settings, models, broken, flower="flower" in commands)
    supervisor = Supervisor(
        settings.data.dir,
        cwd=root,
        grace_s=settings.worker.grace_s,
        on_event=screen.show,
        follow=logs,
        log_bytes=settings.log.max_bytes,
        logs_kept=settings.log.kept,
    )
    # Before the ports: a platform that has the data directory also has the ports, and the error
    # about the directory explains more.
    supervisor.lock()
    try:
        _check_ports_are_free(settings, flower=flower)
        add_worker = _add_processes(supervisor, commands, models, settings, screen)

        def welcome(model: str) -> None:
            add_worker(model)
            screen.welcome(model)

        newcomers = Newcomers(settings.repository, models, welcome)
        with own_terminal(), screen, newcomers if chosen is None else nullcontext():
            supervisor.run_forever()
    finally:
        # Also releases the lock if nothing was started.
        supervisor.stop()
    out.print("Stopped.")


def _check_ports_are_free(settings: Settings, *, flower: bool) -> None:
    check_port(settings.server.host, settings.server.port, variable("server", "port"))
    if flower:
        check_port(settings.flower.host, settings.flower.port, variable("flower", "port"))
    if settings.redis.url is None and settings.redis.address is not None:
        check_port(*settings.redis.address, variable("redis", "port"))


def _add_processes(
    supervisor: Supervisor,
    commands: Mapping[str, str],
    models: Sequence[str],
    settings: Settings,
    screen: Screen,
) -> Callable[[str], None]:
    """Add the Procfile's processes to the supervisor, the worker line once for each model.

    Returns:
      A function that adds a worker for one more model.
    """
    environment = {}
    if settings.broker.scheme in ("amqp", "amqps"):
        # A Redis broker may be the embedded server, which is not started yet.
        reach_broker(settings)
    if settings.redis.url is not None:
        reach_redis(settings.redis)
    else:
        redis = embedded_redis.prepare(settings.data.dir, settings.redis)
        environment[variable("redis", "url")] = redis.url
        screen.redis = redis
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


@click.command()
@click.argument("model")
def worker(model: str) -> None:
    """Run one more worker for MODEL, in the foreground.

    It takes tasks from the model's lane, beside the workers that run already. Without
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
            f"set {variable('redis', 'url')} to the Redis of a running platform."
        )
    own_bin = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)]),
        variable("redis", "url"): url,
        variable("worker", "model_name"): model,
    }
    command = f"exec env {read_procfile(root)['worker']}"
    os.execve("/bin/sh", ["/bin/sh", "-c", command], environment)
