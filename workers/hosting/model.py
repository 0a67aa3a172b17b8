"""One model of a worker: which of its versions are loaded, and which should be.

Threads of the pool ask for engines; the reconciler's thread loads and unloads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Lock

from inferno.batching.pace import Pace
from inferno.engine.engine import Engine
from inferno.errors import ModelNotFound, PackageError
from inferno.repository.package import Package
from inferno.repository.repository import Model
from inferno.settings import Settings
from tasks.state.cluster import HeldVersion
from tasks.state.deployments import Deployment
from workers.batches.execution import threads
from workers.ensembles.ensemble import Ensemble
from workers.hosting.loading import Failure, Loaded, Loader, NoRoom

logger = logging.getLogger(__name__)


class HostedModel:
    """One model of a worker, with the engines of its versions."""

    def __init__(self, model: Model, settings: Settings, loader: Loader) -> None:
        """Store what to load; nothing is loaded yet.

        Args:
          model: the model as it is in the repository.
          settings: batching, inference and repository.
          loader: loads versions.
        """
        self.model = model
        #: Desired state of the model.
        self.desired = Deployment()
        self._settings = settings
        self._loader = loader
        self._loaded: dict[int, Loaded] = {}
        self._failures: dict[int, Failure] = {}
        #: Versions that were unloaded, and stay so until they are asked for.
        self._dismissed: set[int] = set()
        #: Versions that have just lost their share of the requests.
        self._retired: set[int] = set()
        #: The version that is being loaded.
        self._loading: int | None = None
        #: Held while a version is loaded: one at a time.
        self._lock = Lock()
        #: Called before a version is loaded, with its package and whether others may be unloaded.
        self.make_room: Callable[[Package, bool], None] = lambda package, evict: None
        #: Called after each `reconcile`.
        self.reconciled: Callable[[], None] = lambda: None
        # All versions share the lane, so its properties come from the version active at the start.
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
        """Most rows of a batch that every version accepts, because any may come next."""
        default = self._settings.batching.max_batch_size
        return min(package.max_batch_size(default) for package in self.model.versions.values())

    @property
    def prefetch(self) -> int:
        """Number of tasks to hold: one full batch for each thread."""
        return self.max_batch_size * self.threads

    @property
    def threads(self) -> int:
        """Number of threads that work on its batches."""
        return threads(self.executors)

    @property
    def ready(self) -> list[int]:
        """The versions that are loaded and warm."""
        return sorted(self._loaded)

    @property
    def takes_tasks(self) -> bool:
        """Whether this worker can use the versions that answer requests without a version."""
        answering = set(self.desired.weights)
        if self.model.follows_latest:
            answering &= self.model.versions.keys()
        elif not self.desired.pinned and self.model.active is not None:
            answering = {self.model.active}
        if any(v in self._failures and v not in self._loaded for v in answering):
            return False
        return bool(answering or self._loaded or not self._failures)

    @property
    def held(self) -> dict[int, HeldVersion]:
        """State of each version in this worker."""
        found = {
            version: HeldVersion(
                "failed", load_generation=failure.load_generation, error=failure.error
            )
            for version, failure in list(self._failures.items())
        }
        for version, loaded in list(self._loaded.items()):
            found[version] = HeldVersion(
                "ready",
                loaded.digest,
                loaded.load_generation,
                loaded.error,
                round(loaded.load_s, 3),
                loaded.memory_bytes,
            )
        if (loading := self._loading) is not None and loading not in self._loaded:
            found[loading] = HeldVersion("loading")
        return found

    @property
    def memory_bytes(self) -> int:
        """Memory of all loaded versions, as far as it can be measured."""
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

    def predict(self, version: int, rows: int) -> float:
        """Return the predicted seconds of a forward pass; 0 if unknown."""
        loaded = self._loaded.get(version)
        return loaded.engine.predict(rows) if loaded else 0.0

    def reconcile(self, model: Model, desired: Deployment) -> None:
        """Load the versions that should be loaded and are not.

        Args:
          model: the model as it is in the repository now, with the versions that answer.
          desired: its desired state.
        """
        if self._settings.repository.preload != "all":
            self._retired |= self.desired.weights.keys()
        self._retired -= {version for version in self._retired if desired.wants(version)}
        self.model, self.desired = model, desired
        self._dismissed &= model.versions.keys()
        for version in list(self._failures):
            gone = version not in model.versions and not desired.wants(version)
            if gone or self._is_due(version):
                # Its files have changed, so the old failure says nothing.
                del self._failures[version]
        answering = [v for v in desired.weights if desired.pinned or v in model.versions]
        for version in [*answering, *sorted(desired.loaded)]:
            self._try(version, evict=True)
        for version in self._to_preload():
            self._try(version, evict=version == model.active)
            if self._settings.repository.preload == "active" and version in self._loaded:
                break
        self.reconciled()

    def _to_preload(self) -> list[int]:
        """Return the versions to load without being asked, in the order in which to try them."""
        preload, model = self._settings.repository.preload, self.model
        if preload == "none" or (preload == "active" and self.desired.pinned):
            return []
        if preload == "active" and not model.follows_latest:
            return [] if model.active is None else [model.active]
        # Newest first: if the newest version is broken, the one before it answers.
        versions = model.versions.keys() - self.desired.withdrawn - self._dismissed
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
        """Return whether a version should be loaded, or compared with its files again."""
        generation = self.desired.load_generations.get(version, 0)
        loaded, failure = self._loaded.get(version), self._failures.get(version)
        if failure is not None:
            package = self.model.versions.get(version)
            seen = None if package is None else package.seen
            return failure.load_generation != generation or failure.seen != seen
        return loaded is None or loaded.load_generation != generation

    def _load(self, version: int, *, evict: bool = True) -> Loaded:
        """Load a version; a loaded one whose files are unchanged stays as it is."""
        started = time.monotonic()
        generation = self.desired.load_generations.get(version, 0)
        package, present = None, self._loaded.get(version)
        self._loading = version
        try:
            package = self.model.package(version)
            # Read before loading, so that a change meanwhile is noticed later.
            digest = package.digest
            if present is not None and present.digest == digest:
                present.load_generation, present.error = generation, None
                self._failures.pop(version, None)
                return present
            logger.info("loading %s version %s", self.name, version)
            self.make_room(package, evict)
            engine = self._loader.load(package, beside=bool(self._loaded))
        except (PackageError, ModelNotFound) as exc:
            if present is not None:
                present.load_generation, present.error = generation, exc.detail
            if not isinstance(exc, NoRoom):
                seen = None if package is None else package.seen
                self._failures[version] = Failure(exc.detail, generation, seen)
            elif evict:
                # Without `seen`, the next `reconcile` tries again: there may be room by then.
                self._failures[version] = Failure(exc.detail, generation, None)
            raise
        finally:
            self._loading = None
        now = time.monotonic()
        loaded = Loaded(engine, digest, generation, now - started, now)
        self._loaded[version] = loaded
        self._failures.pop(version, None)
        self._dismissed.discard(version)
        self._retired.discard(version)
        return loaded

    def drains(self, version: int) -> bool:
        """Return whether a version is to be unloaded as soon as its last tasks are done."""
        return version in self.desired.withdrawn or version in self._retired

    def idle(self) -> list[tuple[float, int]]:
        """Return the versions that may be unloaded, as (last use in monotonic seconds, version)."""
        pinned = self._settings.repository.pinned
        return [
            (loaded.used_at, version)
            for version, loaded in list(self._loaded.items())
            if self.drains(version)
            or not (
                self.desired.wants(version)
                or version == self.model.active
                or self.name in pinned
                or f"{self.name}/{version}" in pinned
            )
        ]

    def unload(self, version: int) -> None:
        """Drop a version; a running pass keeps its engine until it is over."""
        # Without the lock: the thread that needs the room may hold it.
        if self._loaded.pop(version, None) is not None:
            self._dismissed.add(version)
            logger.info("unloaded %s version %s", self.name, version)
