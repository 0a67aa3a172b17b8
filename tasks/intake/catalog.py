"""Which models there are, and which version of one answers a request.

The packages come from the repository's folder, and what is wanted of them from Redis. Both are
looked at again every few seconds, and at once when a submit finds that its choice is outdated.
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
from tasks.state.deployments import Deployments, Desired

logger = logging.getLogger(__name__)

#: Before a request is refused because its model is not known, the repository's folder is looked at
#: again, if that was longer ago, in seconds.
MISSING_S = 1.0


class Catalog:
    """The models that this process knows of."""

    def __init__(self, deployments: Deployments, settings: Settings) -> None:
        """Read the packages; what is wanted of them is read when it is needed first.

        Raises:
          PackageError: the model repository cannot be read.
        """
        self._deployments = deployments
        self._settings = settings
        self._reading = Lock()
        self._packages = self._read_packages(None)
        # An older one than any: the first submit finds out.
        self._desired = Desired(-1, {})
        #: The models, with the versions that answer by the generation beside it.
        self._served = (self._packages, self._desired.generation)
        self._read_at = time.monotonic()

    @property
    def repository(self) -> Repository:
        """The models, as they were known last."""
        return self._served[0]

    def choose(
        self, model: str, version: int | None, sticky: str | None = None
    ) -> tuple[Package, int]:
        """Return the version that shall answer a request.

        Args:
          model: that it names.
          version: that it names, if it does.
          sticky: requests with the same key get the same version, as long as shares stay the same.
        Returns:
          the version, and the generation by which it was chosen.
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
            # It may have come since, or been put into service.
            with suppress(BrokerUnavailable):
                self.refresh(packages=age_s > MISSING_S)
            return self._choose(model, version, point)

    def _choose(self, model: str, version: int | None, point: float) -> tuple[Package, int]:
        repository, generation = self._served
        return repository.model(model).served(version, point), generation

    def refresh(self, *, packages: bool = True) -> Repository:
        """Look again at what is wanted of the models, and return them.

        Args:
          packages: look at the repository's folder, too. That is done in any case when something
            is newly wanted that is not known, such as a version that another front end has found.
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
            logger.warning("what is wanted of the models is not known: %s", exc)
        except (PackageError, OSError) as exc:
            logger.error("the model repository cannot be read again: %s", exc)

    def _read_packages(self, before: Repository | None) -> Repository:
        repository = Repository.read(self._settings.repository, before)
        for model in repository.models.values():
            for package in model.versions.values():
                if self._settings.cache.enabled and (package.keeps_results or package.coalesces):
                    # Now, because it reads every file, and together with the manifest.
                    _ = package.digest
        return repository


def _point(key: str) -> float:
    """Return a number from 0 to 1 that is the same for equal keys, in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
