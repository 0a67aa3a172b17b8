"""Load a version: build its engine and warm it up, on the right cores and at the right priority.

It runs on the thread that reconciles, or on a thread of the pool whose task needs the version.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from inferno.engine.cores import Cores
from inferno.engine.device import choose_device
from inferno.engine.engine import Engine
from inferno.errors import PackageError
from inferno.repository.package import Package, Stamp
from inferno.settings import Settings
from tasks.gateway import Gateway
from workers.ensembles.ensemble import Ensemble

#: Added to the nice value of a thread that loads beside a version that answers, see nice(1). Where
#: both want the same core, the loading thread gets a tenth of it.
NICENESS = 10


class NoRoom(PackageError):
    """The memory budget has no room for a version beside the loaded ones."""


@dataclass
class Loaded:
    """A version that is loaded and warm."""

    engine: Engine | Ensemble
    #: `Package.digest` of the loaded files.
    digest: str
    #: `Deployment.load_generations` when the loaded files were last compared with the repository.
    load_generation: int
    #: Time of loading and warming up, in seconds.
    load_s: float
    #: Last use, in monotonic seconds.
    used_at: float
    #: Reason why it could not be reloaded.
    error: str | None = None

    @property
    def memory_bytes(self) -> int:
        """Memory of the version, as far as it can be measured."""
        return self.engine.memory_bytes


@dataclass(frozen=True)
class Failure:
    """A version that could not be loaded."""

    error: str
    #: `Deployment.load_generations` at the attempt.
    load_generation: int
    #: `Package.seen` of the files that could not be loaded; None if there were none.
    seen: Stamp | None


class Loader:
    """Loads versions for all models of a worker."""

    def __init__(self, settings: Settings, cores: Cores, gateway: Callable[[], Gateway]) -> None:
        """Store what engines and ensembles need.

        Args:
          settings: batching and inference.
          cores: cores that passes run on.
          gateway: returns the gateway through which all ensembles submit their stages.
        """
        self._settings = settings
        self._cores = cores
        self._gateway = gateway

    def load(self, package: Package, *, beside: bool) -> Engine | Ensemble:
        """Load a version and warm it up.

        Args:
          package: the version.
          beside: whether another version of the model answers meanwhile.
        Raises:
          PackageError: it cannot be loaded.
        """
        if package.is_ensemble:
            return Ensemble(package, self._gateway())
        if not beside:
            with self._cores.taken():
                return self._warm_engine(package, Engine.MEASUREMENTS)
        # Each pass of the warm-up slows down the version that answers, so every size is run only
        # once. Real passes soon correct what these measurements get wrong.
        where: AbstractContextManager[None]
        initializer: Callable[[], None] | None
        if self._loads_in_one_thread(package):
            # Not on the cores that are kept for passes: it would get only a tenth of one.
            where, initializer = nullcontext(), _lower_priority
        else:
            # The runtime's own threads inherit the cores.
            where, initializer = self._cores.taken(), None
        with where, ThreadPoolExecutor(1, f"load-{package.name}", initializer) as loader:
            return loader.submit(self._warm_engine, package, 0).result()

    def _warm_engine(self, package: Package, measurements: int) -> Engine:
        engine = Engine(package, self._settings.batching, self._settings.inference)
        engine.warm_up(measurements)
        return engine

    def _loads_in_one_thread(self, package: Package) -> bool:
        """Return whether the runtime starts no threads of its own.

        Such threads would keep a lowered priority for good, because raising it needs privileges. A
        pass of ONNX Runtime with one thread runs in the calling thread.
        """
        inference = package.inference(self._settings.inference)
        alone = inference.pass_threads(package.executors) == 1
        return (
            package.manifest.format == "onnx" and alone and choose_device(inference.device) == "cpu"
        )


def _lower_priority() -> None:
    """Lower the priority of this thread for good."""
    # Elsewhere, threads have no priority of their own.
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
