"""Which models a worker serves, and their engines: load, warm up, hand out, unload."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock

from celery import Celery

from inferno.batching.former import BatchFormer, Bucket
from inferno.batching.pace import Pace
from inferno.engine.cores import Cores
from inferno.engine.engine import Engine, choose_device
from inferno.errors import ConfigurationError, ModelNotFound, PackageError
from inferno.repository.repository import Model, Package, Repository, Stamp
from inferno.settings import Settings
from tasks.broker.lanes import Lanes
from tasks.state.cluster import HeldVersion
from tasks.state.deployments import Deployment
from workers.batches.consumer import InferenceTask, threads
from workers.batches.forward import Batch, Member
from workers.batches.settle import Settler
from workers.ensembles.ensemble import Coordinator, Ensemble
from workers.hosting.watchdog import Watchdog

logger = logging.getLogger(__name__)


#: By how much the priority of a thread that loads beside a version that answers is lowered, see
#: nice(1): where both want the same core, it gets a tenth of it.
NICENESS = 10


class NoRoom(PackageError):
    """What is loaded already leaves no room for a version within the memory budget."""


@dataclass
class Loaded:
    """A version that is loaded and warm."""

    engine: Engine | Ensemble
    #: `Package.digest` of what was loaded.
    digest: str
    #: As `Deployment.load_generations` when that was found to be what the repository holds.
    asked: int
    #: How long it took, in seconds.
    load_s: float
    #: When it was used last; monotonic seconds.
    used_at: float
    #: Why it could not be loaded anew.
    error: str | None = None

    @property
    def memory_bytes(self) -> int:
        """What it takes of memory, as far as it can be known."""
        return self.engine.memory_bytes


@dataclass(frozen=True)
class Failure:
    """A version that could not be loaded."""

    error: str
    #: As `Deployment.load_generations`.
    asked: int
    #: `Package.seen` of what could not be loaded; None if there was nothing.
    seen: Stamp | None


class HostedModel:
    """One model of a worker, with the engines of its versions."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        watchdog: Watchdog,
        cores: Cores,
        coordinator: Callable[[], Coordinator],
    ) -> None:
        """Store what to load; nothing is loaded yet.

        Args:
          model: as it is in the repository.
          settings: of batches, passes and the repository.
          watchdog: of this process.
          cores: where passes run.
          coordinator: gives the one of this process, for versions that are ensembles.
        """
        self._coordinator = coordinator
        self.model = model
        self.wanted = Deployment()
        self._settings = settings
        self._watchdog = watchdog
        self._cores = cores
        self._loaded: dict[int, Loaded] = {}
        self._failures: dict[int, Failure] = {}
        #: Versions that had to go, and are not loaded again until somebody asks for them.
        self._dismissed: set[int] = set()
        #: Versions that have just lost their share of the requests.
        self._retired: set[int] = set()
        #: The version that is being loaded.
        self._loading: int | None = None
        self._lock = Lock()
        self._task: InferenceTask | None = None
        #: Called before a version is loaded, with its package and whether others may have to go.
        self.make_room: Callable[[Package, bool], None] = lambda package, evict: None
        # What a lane is like for all versions is as the one has it that is active at first.
        package = model.described
        delay_ms = package.max_batch_delay_ms(settings.batching.max_batch_delay_ms)
        self.window_s = delay_ms / 1000
        slo_ms = package.slo_p95_ms(settings.batching.slo_p95_ms)
        self.objective_s = None if slo_ms is None else slo_ms / 1000
        self.executors = package.executors
        self.pace = Pace(self.max_batch_size, self.executors)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def max_batch_size(self) -> int:
        """Rows of a batch, at most; one that suits all versions, because any may come next."""
        default = self._settings.batching.max_batch_size
        return min(package.max_batch_size(default) for package in self.model.versions.values())

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
        return sorted(self._loaded)

    @property
    def takes_tasks(self) -> bool:
        """Whether those versions that answer who names none can be used here."""
        answering = set(self.wanted.weights)
        if self.model.follows_latest:
            answering &= self.model.versions.keys()
        elif not self.wanted.pinned and self.model.active is not None:
            answering = {self.model.active}
        if any(v in self._failures and v not in self._loaded for v in answering):
            return False
        return bool(answering or self._loaded or not self._failures)

    @property
    def held(self) -> dict[int, HeldVersion]:
        """What there is to be said of each version."""
        found = {
            version: HeldVersion("failed", load_generation=failure.asked, error=failure.error)
            for version, failure in list(self._failures.items())
        }
        for version, loaded in list(self._loaded.items()):
            found[version] = HeldVersion(
                "ready",
                loaded.digest,
                loaded.asked,
                loaded.error,
                round(loaded.load_s, 3),
                loaded.memory_bytes,
            )
        if (loading := self._loading) is not None and loading not in self._loaded:
            found[loading] = HeldVersion("loading")
        return found

    @property
    def memory_bytes(self) -> int:
        """What the loaded versions take of memory together, as far as it can be known."""
        return sum(loaded.memory_bytes for loaded in list(self._loaded.values()))

    @property
    def digests(self) -> dict[str, str]:
        """`Package.digest` of the loaded versions whose results are kept."""
        return {
            f"{self.name}/{version}": loaded.digest
            for version, loaded in list(self._loaded.items())
            if loaded.engine.package.keeps_results
        }

    def engine(self, version: int) -> Engine | Ensemble:
        """Return the engine of a version, loading it at the first call.

        Raises:
          ModelNotFound: there is no such version.
          PackageError: it cannot be loaded.
        """
        loaded = self._loaded.get(version)
        if loaded is None:
            with self._lock:
                loaded = self._loaded.get(version)
                if loaded is None and not self._is_due(version):
                    raise PackageError(self._failures[version].error)
                loaded = loaded or self._load(version)
        loaded.used_at = time.monotonic()
        return loaded.engine

    def reconcile(self, model: Model, wanted: Deployment) -> None:
        """Load what is wanted and is not there.

        Args:
          model: as it is in the repository now, with the versions that answer.
          wanted: what is wanted of it.
        """
        if self._settings.repository.preload != "all":
            self._retired |= self.wanted.weights.keys()
        self._retired -= {version for version in self._retired if wanted.wants(version)}
        self.model, self.wanted = model, wanted
        self._dismissed &= model.versions.keys()
        for version in list(self._failures):
            gone = version not in model.versions and not wanted.wants(version)
            if gone or self._is_due(version):
                # Its files have changed, so that it is as if it had not been tried.
                del self._failures[version]
        answering = [v for v in wanted.weights if wanted.pinned or v in model.versions]
        for version in [*answering, *sorted(wanted.loaded)]:
            self._try(version, evict=True)
        for version in self._to_preload():
            self._try(version, evict=version == model.active)
            if self._settings.repository.preload == "active" and version in self._loaded:
                break
        if self._task is not None:
            self._task.serve(self.model, self.max_batch_size)

    def _to_preload(self) -> list[int]:
        """Return the versions that are loaded although nobody has asked for them."""
        preload, model = self._settings.repository.preload, self.model
        if preload == "none" or (preload == "active" and self.wanted.pinned):
            return []
        if preload == "active" and not model.follows_latest:
            return [] if model.active is None else [model.active]
        # Downwards: where the newest version is broken, the one before has to do.
        versions = model.versions.keys() - self.wanted.withdrawn - self._dismissed
        return sorted(versions, reverse=True)

    def _try(self, version: int, *, evict: bool) -> None:
        with self._lock:
            if self._is_due(version):
                try:
                    self._load(version, evict=evict)
                except NoRoom as exc:
                    logger.warning("%s version %s is not loaded: %s", self.name, version, exc)
                    self._dismissed.add(version)
                except (PackageError, ModelNotFound) as exc:
                    logger.error("%s version %s is not served: %s", self.name, version, exc)

    def _is_due(self, version: int) -> bool:
        """Return whether a version should be loaded, or looked at again."""
        asked = self.wanted.load_generations.get(version, 0)
        loaded, failure = self._loaded.get(version), self._failures.get(version)
        if failure is not None:
            package = self.model.versions.get(version)
            seen = None if package is None else package.seen
            return failure.asked != asked or failure.seen != seen
        return loaded is None or loaded.asked != asked

    def _load(self, version: int, *, evict: bool = True) -> Loaded:
        """Load a version, also if it is there: then it stays if its files are the same."""
        started = time.monotonic()
        asked = self.wanted.load_generations.get(version, 0)
        package, present = None, self._loaded.get(version)
        self._loading = version
        try:
            package = self.model.package(version)
            # Before it is loaded, so that what changes meanwhile is not taken for what was loaded.
            digest = package.digest
            if present is not None and present.digest == digest:
                present.asked, present.error = asked, None
                self._failures.pop(version, None)
                return present
            logger.info("loading %s version %s", self.name, version)
            self.make_room(package, evict)
            engine = self._loaded_engine(package)
        except (PackageError, ModelNotFound) as exc:
            if present is not None:
                present.asked, present.error = asked, exc.detail
            if not isinstance(exc, NoRoom):
                seen = None if package is None else package.seen
                self._failures[version] = Failure(exc.detail, asked, seen)
            elif evict:
                # There may be room the next time.
                self._failures[version] = Failure(exc.detail, asked, None)
            raise
        finally:
            self._loading = None
        now = time.monotonic()
        loaded = Loaded(engine, digest, asked, now - started, now)
        self._loaded[version] = loaded
        self._failures.pop(version, None)
        self._dismissed.discard(version)
        self._retired.discard(version)
        return loaded

    def _loaded_engine(self, package: Package) -> Engine | Ensemble:
        if package.is_ensemble:
            return Ensemble(package, self._coordinator())
        if not self._loaded:
            with self._cores.taken():
                return self._warm_engine(package, Engine.MEASUREMENTS)
        # Another version answers meanwhile, and each pass here slows it down. What a first pass
        # says wrongly of the latency is soon corrected by what is asked.
        where: AbstractContextManager[None]
        initializer: Callable[[], None] | None
        if self._loads_in_one_thread(package):
            # Not on the cores that are kept for passes: it would get a tenth of one there.
            where, initializer = nullcontext(), _give_way
        else:
            # A runtime's own threads have to be there.
            where, initializer = self._cores.taken(), None
        with where, ThreadPoolExecutor(1, f"load-{self.name}", initializer) as loader:
            return loader.submit(self._warm_engine, package, 0).result()

    def _warm_engine(self, package: Package, measurements: int) -> Engine:
        engine = Engine(package, self._settings.batching, self._settings.inference)
        engine.warm_up(measurements)
        return engine

    def _loads_in_one_thread(self, package: Package) -> bool:
        """Return whether the runtime starts no threads, which would keep a low priority for good.

        Without privileges a priority cannot be raised again. A pass of ONNX Runtime with one thread
        runs in whichever thread asks for it.
        """
        inference = package.inference(self._settings.inference)
        alone = inference.pass_threads(package.executors) == 1
        return (
            package.manifest.format == "onnx" and alone and choose_device(inference.device) == "cpu"
        )

    def drains(self, version: int) -> bool:
        """Return whether a version is to be unloaded as soon as its last tasks are done."""
        return version in self.wanted.withdrawn or version in self._retired

    def idle(self) -> list[tuple[float, int]]:
        """Return the versions that may be unloaded, each after the time of its last use."""
        pinned = self._settings.repository.pinned
        return [
            (loaded.used_at, version)
            for version, loaded in list(self._loaded.items())
            if self.drains(version)
            or not (
                self.wanted.wants(version)
                or version == self.model.active
                or self.name in pinned
                or f"{self.name}/{version}" in pinned
            )
        ]

    def unload(self, version: int) -> None:
        """Let go of a version; a pass that is under way keeps it until it is over."""
        # Without the lock, which may be held by whoever needs the room.
        if self._loaded.pop(version, None) is not None:
            self._dismissed.add(version)
            logger.info("unloaded %s version %s", self.name, version)

    def watch(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context that ends the process if a forward pass in it takes too long."""
        package = batch.members[0].package
        what = (
            f"a forward pass of {self.name} version {package.version} "
            f"(batch {batch.id} of {len(batch.members)} tasks)"
        )
        return self._watchdog.watch(what, package.timeout_s(self._settings.inference.timeout_s))

    def _predict(self, bucket: Bucket, rows: int) -> float:
        loaded = self._loaded.get(bucket.version)
        return loaded.engine.predict(rows) if loaded else 0.0

    @property
    def saturated(self) -> bool:
        """Whether this model's passes are on cores that this worker keeps busy.

        An ensemble's stages run elsewhere, and passes on a GPU need no cores.
        """
        return self._cores.saturated and all(
            isinstance(loaded.engine, Engine) and loaded.engine.device == "cpu"
            for loaded in list(self._loaded.values())
        )

    def task(self, settler: Settler, lanes: Lanes) -> InferenceTask:
        """Return the Celery task that serves this model's lane."""
        former: BatchFormer[Member] = BatchFormer(
            self.max_batch_size,
            self.window_s,
            self._settings.batching.adaptive,
            self._predict,
            self.objective_s,
            self.executors,
            lambda: self.saturated,
        )
        self._task = InferenceTask(
            self.model,
            self.engine,
            settler,
            lanes,
            executors=self.executors,
            former=former,
            watch=self.watch,
            cores=self._cores,
            pace=self.pace,
            settings=self._settings.events,
        )
        return self._task


def _give_way() -> None:
    """Lower the priority of this thread for good."""
    # Elsewhere threads have none of their own.
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


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
    coordinator = cache(lambda: Coordinator(app, settings))
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
        model = HostedModel(repository.models[lane], settings, watchdog, cores, coordinator)
        app.register_task(model.task(settler, lanes))
        hosted.append(model)
    return hosted
