"""Loads, activates and unloads versions of models in all their workers, and waits for the result.

    load      every worker loads and warms up the version    -> switch: it answers
    activate  the same for several versions                  -> switch: each gets its share
    unload    switch: no request goes to the version         -> every worker drops it

The switch is one write in Redis; it applies to every request that is accepted after it. If any
worker cannot load a version, the earlier desired state is restored and nothing is switched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from inferno.errors import LoadFailed, ModelUnavailable, NotInTime, for_callers
from inferno.repository.repository import Model
from inferno.settings import RepositorySettings
from tasks.state.cluster import Cluster, WorkerReport
from tasks.state.deployments import Deployment, Deployments

logger = logging.getLogger(__name__)

#: Pause between two looks at the workers' reports, in seconds.
LOOK_S = 0.05


class Rollouts:
    """Changes the desired state of a model, and waits until its workers have reached it."""

    def __init__(
        self, deployments: Deployments, cluster: Cluster, settings: RepositorySettings
    ) -> None:
        """Store where desired states and reports are, and how long to wait for the workers."""
        self._deployments = deployments
        self._cluster = cluster
        self._settings = settings

    def load(self, model: Model, version: int | None, *, activate: bool = True) -> int:
        """Load a version in every worker of a model; reload it if its files have changed.

        Args:
          model: the model.
          version: the version; None for the newest, now and whenever a newer one appears.
          activate: send all requests that name no version to this one.
        Returns:
          the loaded version.
        Raises:
          ModelNotFound: the model has no such version.
          ModelUnavailable: no worker serves the model.
          LoadFailed: a worker could not load the version; nothing has changed.
          NotInTime: the version was not loaded in time; nothing has changed.
          BrokerUnavailable: Redis does not answer.
        """
        package = model.newest if version is None else model.package(version)
        chosen = package.version
        fixed = version is not None or model.name in self._settings.active

        def desired(now: Deployment) -> Deployment:
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

        self._roll(model.name, [chosen], desired, switched)
        return chosen

    def activate(self, model: Model, shares: Mapping[int, float]) -> None:
        """Share the requests that name no version among some versions.

        Args:
          model: the model.
          shares: weight of each version, relative to the others.
        Raises:
          ModelNotFound, ModelUnavailable, LoadFailed, NotInTime, BrokerUnavailable: as `load`.
        """
        for version in shares:
            model.package(version)

        def desired(now: Deployment) -> Deployment:
            return replace(
                now, loaded=now.loaded | shares.keys(), withdrawn=now.withdrawn - shares.keys()
            )

        def switched(now: Deployment) -> Deployment:
            return replace(
                now, weights=dict(shares), pinned=True, loaded=now.loaded - shares.keys()
            )

        self._roll(model.name, shares, desired, switched)

    def unload(self, model: Model, version: int | None = None) -> None:
        """Take a version out of service, and wait until every worker has dropped it.

        Args:
          model: the model.
          version: the version; None for all versions.
        Raises:
          ModelNotFound: the model has no such version.
          NotInTime: a worker still holds the version; it gets no requests any more.
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
                report.label
                for report in self._cluster.serving(model.name, 0.0)
                if any(
                    held.state != "failed" and v in gone
                    for v, held in report.held.get(model.name, {}).items()
                )
            ],
            f"{model.name} is still loaded in worker",
        )

    def _roll(
        self,
        name: str,
        versions: Iterable[int],
        desired: Callable[[Deployment], Deployment],
        switched: Callable[[Deployment], Deployment],
    ) -> None:
        if not self._cluster.serving(name, 0.0):
            raise ModelUnavailable(
                f"no live worker serves {name}; start one with: inferno worker {name}", "model"
            )
        before = self._deployments.change(name, desired)
        during = desired(before)

        def missing() -> list[str]:
            reports = self._cluster.serving(name, 0.0)
            if not reports:
                raise ModelUnavailable(f"the last worker of {name} has stopped", "model")
            found = [_progress(report, name, v, during) for report in reports for v in versions]
            failures = [reason for state, reason in found if state == "failed"]
            if failures:
                raise LoadFailed(
                    f"{'; '.join(failures)}; the earlier version still answers", "version"
                )
            return [reason for state, reason in found if state != "ready"]

        try:
            self._wait(missing, f"{name} is not loaded in worker")
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


def _progress(
    report: WorkerReport, name: str, version: int, desired: Deployment
) -> tuple[str, str]:
    """Return the state of a version in a worker, and the worker's label or what went wrong."""
    held = report.held.get(name, {}).get(version)
    if held is None or held.load_generation < desired.load_generations.get(version, 0):
        return "waiting", report.label
    if held.error is not None:
        why = for_callers(held.error)
        return "failed", f"worker {report.label} cannot load {name} version {version}: {why}"
    return held.state, report.label
