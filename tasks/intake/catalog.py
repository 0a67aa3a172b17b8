"""The models of this process, and the choice of the version that answers (step "submit").

Packages come from the repository's folder, and the desired state from Redis. Both are read again
every few seconds, and at once when a task is refused because its choice is outdated. The periodic
read runs on a thread of its own.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from contextlib import suppress
from threading import Lock, Thread

from inferno.errors import BrokerUnavailable, ModelNotFound, PackageError
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import Settings
from tasks.state.deployments import Deployments

logger = logging.getLogger(__name__)

#: Minimum age of the packages, in seconds, at which the folder is read again before a request for
#: an unknown model is refused.
MISSING_S = 1.0


class Catalog:
    """The models that this process knows."""

    def __init__(self, deployments: Deployments, settings: Settings) -> None:
        """Read the packages; the first use reads the desired state.

        Raises:
          PackageError: the model repository cannot be read.
        """
        self._deployments = deployments
        self._settings = settings
        self._reading = Lock()
        self._packages = self._read_packages(None)
        #: The models with the versions that answer, and the generation that says so. The first
        #: submit finds that its generation is outdated, and reads the desired state.
        self._served = (self._packages, -1)
        self._read_at = time.monotonic()

    @property
    def repository(self) -> Repository:
        """The models as of the last read."""
        return self._served[0]

    def choose(
        self, model: str, version: int | None, sticky: str | None = None
    ) -> tuple[Package, int]:
        """Return the version that answers a request.

        Args:
          model: name of the model.
          version: the version that the request names, if any.
          sticky: requests with the same key get the same version while the weights do not change.
        Returns:
          the version, and the generation under which it was chosen.
        Raises:
          ModelNotFound: there is no such model or version, or it is out of service.
        """
        age_s = time.monotonic() - self._read_at
        if age_s > self._settings.repository.reconcile_interval_s:
            self._read_at = time.monotonic()
            Thread(target=self._try_to_refresh, name="catalog", daemon=True).start()
        point = random.random() if sticky is None else _point(f"{model}:{sticky}")
        try:
            return self._choose(model, version, point)
        except ModelNotFound:
            # It may have been added or put into service since the last read.
            with suppress(BrokerUnavailable):
                self.refresh(packages=age_s > MISSING_S)
            return self._choose(model, version, point)

    def _choose(self, model: str, version: int | None, point: float) -> tuple[Package, int]:
        repository, generation = self._served
        return repository.model(model).served(version, point), generation

    def refresh(self, *, packages: bool = True) -> Repository:
        """Read the desired state again, and return the models.

        Args:
          packages: read the repository's folder, too. It is always read when the desired state has
            changed and names an unknown version, for example one that another front end has found.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with self._reading:
            desired = self._deployments.read()
            changed = desired.generation != self._served[1]
            if packages or (changed and not desired.known(self._packages)):
                self._packages = self._read_packages(self._packages)
                self._read_at = time.monotonic()
            self._served = (desired.applied(self._packages), desired.generation)
            return self._served[0]

    def _try_to_refresh(self) -> None:
        try:
            self.refresh()
        except BrokerUnavailable as exc:
            logger.warning("cannot read the desired state of the models: %s", exc)
        except (PackageError, OSError) as exc:
            logger.error("cannot read the model repository again: %s", exc)

    def _read_packages(self, before: Repository | None) -> Repository:
        repository = Repository.read(self._settings.repository, before)
        for model in repository.models.values():
            for package in model.versions.values():
                if self._settings.cache.enabled and (package.keeps_results or package.coalesces):
                    # Computed here, because it reads every file, and must match the manifest.
                    _ = package.digest
        return repository


def _point(key: str) -> float:
    """Return a number from 0 to 1 that is the same for equal keys, in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
