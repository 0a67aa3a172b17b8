"""Build what serves a worker's lanes: for each, a hosted model and its Celery task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache

from celery import Celery

from inferno import names
from inferno.batching.former import BatchFormer
from inferno.engine.cores import Cores
from inferno.errors import ConfigurationError, PackageError
from inferno.protocol.limits import Limits
from inferno.repository.repository import Repository
from inferno.settings import Settings
from tasks.broker.connection import connect
from tasks.broker.lanes import Lanes
from tasks.gateway import Gateway
from workers.batches.consumer import InferenceTask
from workers.batches.execution import Execution
from workers.batches.member import Batch, Member
from workers.batches.settle import Settler
from workers.batches.turns import Turns
from workers.hosting.loading import Loader
from workers.hosting.model import HostedModel
from workers.hosting.watchdog import Watchdog


def host(
    app: Celery,
    queues: Sequence[str],
    settler: Settler,
    lanes: Lanes,
    settings: Settings,
    watchdog: Watchdog,
    cores: Cores,
) -> list[HostedModel]:
    """Register the tasks of the lanes that a worker serves.

    Raises:
      ConfigurationError: a lane has no model, or its package is broken.
    """
    repository = Repository.read(settings.repository)
    loader = Loader(
        settings,
        cores,
        cache(lambda: Gateway.build(app, connect(settings), settings, "inferno-ensembles")),
    )
    hosted = []
    for lane in queues:
        if lane in repository.errors:
            raise PackageError(repository.errors[lane])
        if lane not in repository.models:
            known = ", ".join(repository.models) or "none"
            raise ConfigurationError(
                f"no model {lane!r} in {settings.repository.root}; there are: {known}; "
                "name one with -Q, as in: celery -A tasks worker -Q echo"
            )
        model = HostedModel(repository.models[lane], settings, loader)
        app.register_task(_task(model, settler, lanes, settings, watchdog, cores))
        hosted.append(model)
    return hosted


def _task(
    hosted: HostedModel,
    settler: Settler,
    lanes: Lanes,
    settings: Settings,
    watchdog: Watchdog,
    cores: Cores,
) -> InferenceTask:
    """Return the Celery task that serves a model's lane."""
    former: BatchFormer[Member] = BatchFormer(
        hosted.max_batch_size,
        hosted.window_s,
        settings.batching.adaptive,
        lambda key, rows: hosted.predict(key.version, rows),
        hosted.objective_s,
    )
    turns = Turns(hosted.executors)
    execution = Execution(
        names.task_name(hosted.name),
        hosted.engine,
        settler,
        turns,
        watch=lambda batch: _watch(batch, watchdog, settings.inference.timeout_s),
        cores=cores,
        pace=hosted.pace,
    )
    task = InferenceTask(
        hosted.model,
        lanes,
        settler,
        execution,
        executors=hosted.executors,
        turns=turns,
        former=former,
        limits=Limits.of(settings.limits),
        settings=settings.events,
    )
    hosted.reconciled = lambda: task.serve(hosted.model, hosted.max_batch_size)
    return task


def _watch(batch: Batch, watchdog: Watchdog, timeout_s: float) -> AbstractContextManager[None]:
    """Return a context that ends the process if a forward pass in it takes too long."""
    package = batch.members[0].package
    what = (
        f"a forward pass of {package.name} version {package.version} "
        f"(batch {batch.id} of {len(batch.members)} tasks)"
    )
    return watchdog.watch(what, package.timeout_s(timeout_s))
