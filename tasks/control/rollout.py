"""Loads, switches and unloads versions of models in all their workers, and waits until it is so.

    load      have every worker load and warm up the version   -> switch: it answers
    activate  the same for several versions                    -> switch: each has its share
    unload    switch: it answers nobody                        -> have every worker let go of it

To switch is one write in Redis, which holds for every request that is accepted after it. When any
worker cannot load what it should, what was wanted before is wanted again, and nothing is switched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from inferno.errors import LoadFailed, ModelUnavailable, NotInTime
from inferno.repository.repository import Model
from inferno.settings import RepositorySettings
from tasks.state.cluster import Cluster, WorkerReport
from tasks.state.deployments import Deployment, Deployments

logger = logging.getLogger(__name__)

#: How often the workers' reports are looked at, in seconds.
LOOK_S = 0.05


class Rollouts:
    """Changes what is wanted of a model, and sees to it that it comes about."""

    def __init__(
        self, deployments: Deployments, cluster: Cluster, settings: RepositorySettings
    ) -> None:
        """Store what it works with."""
        self._deployments = deployments
        self._cluster = cluster
        self._settings = settings

    def load(self, model: Model, version: int | None, *, activate: bool = True) -> int:
        """Load a version in every worker of a model, or look again whether its files have changed.

        Args:
          model: which.
          version: by default the newest, and from then on whichever is the newest.
          activate: let it answer all requests that name no version.
        Returns:
          the version.
        Raises:
          ModelNotFound: there is no such version.
          ModelUnavailable: no worker is there.
          LoadFailed: a worker could not load it; nothing has changed.
          NotInTime: it was not loaded in time; nothing has changed.
          BrokerUnavailable: Redis does not answer.
        """
        package = model.newest if version is None else model.package(version)
        chosen = package.version
        fixed = version is not None or model.name in self._settings.active

        def wanted(now: Deployment) -> Deployment:
            return replace(
                now,
                loaded=now.loaded | {chosen},
                withdrawn=now.withdrawn - {chosen},
                load_generations=now.load_generations
                | {chosen: now.load_generations.get(chosen, 0) + 1},
            )

        def switched(now: Deployment) -> Deployment:
            if not activate:
                return now
            return replace(now, weights={chosen: 1.0}, pinned=fixed, loaded=now.loaded - {chosen})

        self._roll(model.name, [chosen], wanted, switched)
        return chosen

    def activate(self, model: Model, shares: Mapping[int, float]) -> None:
        """Let versions answer the requests that name none.

        Args:
          model: which.
          shares: what part each version answers, relative to the others'.
        Raises:
          as `load`.
        """
        for version in shares:
            model.package(version)

        def wanted(now: Deployment) -> Deployment:
            return replace(
                now, loaded=now.loaded | shares.keys(), withdrawn=now.withdrawn - shares.keys()
            )

        def switched(now: Deployment) -> Deployment:
            return replace(
                now, weights=dict(shares), pinned=True, loaded=now.loaded - shares.keys()
            )

        self._roll(model.name, shares, wanted, switched)

    def unload(self, model: Model, version: int | None = None) -> None:
        """Take a version out of service, and wait until no worker has it any more.

        Args:
          model: which.
          version: by default all of them.
        Raises:
          ModelNotFound: there is no such version.
          NotInTime: a worker still has it; it answers nobody nevertheless.
          BrokerUnavailable: Redis does not answer.
        """
        gone = frozenset(model.versions if version is None else [model.package(version).version])

        def without(now: Deployment) -> Deployment:
            return replace(
                now,
                weights={v: weight for v, weight in now.weights.items() if v not in gone},
                loaded=now.loaded - gone,
                withdrawn=now.withdrawn | gone,
            )

        self._deployments.change(model.name, without)
        self._wait(
            lambda: [
                report.worker
                for report in self._cluster.serving(model.name, 0.0)
                if any(
                    held.state != "failed" and v in gone
                    for v, held in report.held.get(model.name, {}).items()
                )
            ],
            f"{model.name} is still loaded in",
        )

    def _roll(
        self,
        name: str,
        versions: Iterable[int],
        wanted: Callable[[Deployment], Deployment],
        switched: Callable[[Deployment], Deployment],
    ) -> None:
        if not self._cluster.serving(name, 0.0):
            raise ModelUnavailable(
                f"no live worker serves {name}; start one with: inferno worker {name}", "model"
            )
        before = self._deployments.change(name, wanted)
        during = wanted(before)

        def missing() -> list[str]:
            reports = self._cluster.serving(name, 0.0)
            if not reports:
                raise ModelUnavailable(f"the last worker of {name} has gone", "model")
            found = [_of(report, name, v, during) for report in reports for v in versions]
            failures = [reason for state, reason in found if state == "failed"]
            if failures:
                raise LoadFailed(
                    f"{'; '.join(failures)}; what answered before still does", "version"
                )
            return [reason for state, reason in found if state != "ready"]

        try:
            self._wait(missing, f"{name} is not loaded yet in")
        except Exception:
            self._deployments.change(
                name,
                lambda now: (
                    replace(before, load_generations=now.load_generations) if now == during else now
                ),
            )
            raise
        self._deployments.change(name, switched)

    def _wait(self, missing: Callable[[], list[str]], what: str) -> None:
        until = time.monotonic() + self._settings.load_timeout_s
        while left := missing():
            if time.monotonic() > until:
                raise NotInTime(
                    f"{what} {', '.join(left)} after {self._settings.load_timeout_s:g} s"
                )
            time.sleep(LOOK_S)


def _of(report: WorkerReport, name: str, version: int, wanted: Deployment) -> tuple[str, str]:
    """Return how far a worker is with a version, and what there is to say of it."""
    held = report.held.get(name, {}).get(version)
    if held is None or held.load_generation < wanted.load_generations.get(version, 0):
        return "waiting", report.worker
    if held.error is not None:
        return "failed", f"{report.worker} cannot load {name} version {version}: {held.error}"
    return held.state, report.worker
