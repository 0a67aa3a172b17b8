"""Which models a worker serves, and their engines: load, warm up, hand out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from threading import Lock

from celery import Celery

from inferno.batching import BatchFormer, Bucket
from inferno.engine import Engine
from inferno.errors import ConfigurationError, PackageError
from inferno.pace import Pace
from inferno.repository import Model, Repository
from inferno.settings import Settings
from tasks.consumer import InferenceTask, threads
from tasks.infer import Batch, Member
from tasks.lanes import Lanes
from tasks.settle import Settler
from workers.watchdog import Watchdog

logger = logging.getLogger(__name__)


class HostedModel:
    """One model of a worker, with the engines of its versions."""

    def __init__(self, model: Model, settings: Settings, watchdog: Watchdog) -> None:
        """Store what to load; nothing is loaded yet."""
        self.model = model
        self._settings = settings
        self._watchdog = watchdog
        self._engines: dict[int, Engine] = {}
        #: `Package.digest` of the versions that are loaded and keep results.
        self.digests: dict[str, str] = {}
        self._loading = Lock()
        manifest = model.package().manifest
        # A batch is formed before it is known which version's turn it is, so it has to suit all.
        self.max_batch_size = min(
            package.max_batch_size(settings.batching.max_batch_size)
            for package in model.versions.values()
        )
        delay_ms = model.package().max_batch_delay_ms(settings.batching.max_batch_delay_ms)
        self.window_s = delay_ms / 1000
        slo_ms = model.package().slo_p95_ms(settings.batching.slo_p95_ms)
        self.objective_s = None if slo_ms is None else slo_ms / 1000
        self.executors = manifest.concurrency.max_concurrency
        self.pace = Pace(self.max_batch_size, self.executors)
        #: Limit of one forward pass, by version.
        self.timeout_s = {
            version: package.timeout_s(settings.inference.timeout_s)
            for version, package in model.versions.items()
        }

    @property
    def prefetch(self) -> int:
        """How many tasks to hold: as many batches as are worked on at the same time."""
        return self.max_batch_size * self.threads

    @property
    def threads(self) -> int:
        """Threads that work on its batches."""
        return threads(self.executors)

    @property
    def ready(self) -> list[int]:
        """The versions that are loaded and warm."""
        return sorted(self._engines)

    def preload(self) -> None:
        """Load and warm up the versions that the settings want at the start.

        Raises:
          PackageError: the active version cannot be loaded. Others are only logged: they take
            nothing else down.
        """
        preload = self._settings.repository.preload
        if preload == "none":
            return
        self.engine(self.model.active)
        if preload == "all":
            for version in sorted(self.model.versions):
                try:
                    self.engine(version)
                except PackageError as exc:
                    logger.error("%s version %s is not served: %s", self.model.name, version, exc)

    def engine(self, version: int) -> Engine:
        """Return the engine of a version, loading it at the first call.

        Raises:
          PackageError: it cannot be loaded.
        """
        engine = self._engines.get(version)
        if engine is None:
            with self._loading:
                engine = self._engines.get(version) or self._load(version)
                self._engines[version] = engine
        return engine

    def _load(self, version: int) -> Engine:
        logger.info("loading %s version %s", self.model.name, version)
        package = self.model.package(version)
        # Before it is loaded, so that what changes meanwhile is not taken for what was loaded.
        digest = package.digest if package.keeps_results else None
        engine = Engine(package, self._settings.batching, self._settings.inference)
        engine.warm_up()
        if digest is not None:
            self.digests[f"{package.name}/{package.version}"] = digest
        return engine

    def watch(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context that ends the process if a forward pass in it takes too long."""
        version = batch.members[0].package.version
        what = (
            f"a forward pass of {self.model.name} version {version} "
            f"(batch {batch.id} of {len(batch.members)} tasks)"
        )
        return self._watchdog.watch(what, self.timeout_s[version])

    def _predict(self, bucket: Bucket, rows: int) -> float:
        engine = self._engines.get(bucket.version)
        return engine.predict(rows) if engine else 0.0

    def task(self, settler: Settler, lanes: Lanes) -> InferenceTask:
        """Return the Celery task that serves this model's lane."""
        former: BatchFormer[Member] = BatchFormer(
            self.max_batch_size,
            self.window_s,
            self._settings.batching.adaptive,
            self._predict,
            self.objective_s,
        )
        return InferenceTask(
            self.model,
            self.engine,
            settler,
            lanes,
            executors=self.executors,
            former=former,
            watch=self.watch,
            pace=self.pace,
            settings=self._settings.events,
        )


def host(
    app: Celery,
    queues: Sequence[str],
    settler: Settler,
    lanes: Lanes,
    settings: Settings,
    watchdog: Watchdog,
) -> list[HostedModel]:
    """Register the tasks of the lanes that a worker serves.

    Raises:
      ConfigurationError: a lane has no model, or its package is broken.
    """
    repository = Repository.read(settings.repository)
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
        model = HostedModel(repository.models[lane], settings, watchdog)
        app.register_task(model.task(settler, lanes))
        hosted.append(model)
    return hosted
