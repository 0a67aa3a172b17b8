"""What the routes of a process share, built once and passed on."""

from __future__ import annotations

from dataclasses import dataclass

import redis
from flask import current_app

from inferno.errors import for_callers
from inferno.repository.repository import Repository
from inferno.settings import Settings
from tasks.broker.connection import connect
from tasks.celery import app as celery_app
from tasks.control.replay import Replay
from tasks.control.rollout import Rollouts
from tasks.control.tasks import Control
from tasks.gateway import Gateway
from tasks.intake.catalog import Catalog
from tasks.state.cluster import Cluster
from tasks.state.dead import DeadLetters
from tasks.state.deployments import Deployments
from tasks.state.kept_results import Cache
from tasks.state.records import Records
from tasks.state.statistics import Statistics


@dataclass(frozen=True)
class Services:
    """The platform as the routes see it."""

    settings: Settings
    client: redis.Redis
    gateway: Gateway
    catalog: Catalog
    cluster: Cluster
    records: Records
    control: Control
    deployments: Deployments
    dead: DeadLetters
    replay: Replay
    cache: Cache
    statistics: Statistics
    rollouts: Rollouts

    @classmethod
    def build(cls, settings: Settings) -> Services:
        """Read the model repository and build the objects; no connection is opened.

        Raises:
          PackageError: the model repository cannot be read.
        """
        client = connect(settings)
        gateway = Gateway.build(celery_app, client, settings, "inferno-web")
        return cls(
            settings=settings,
            client=client,
            gateway=gateway,
            catalog=gateway.catalog,
            cluster=gateway.cluster,
            records=gateway.records,
            control=gateway.control,
            deployments=gateway.deployments,
            dead=DeadLetters(client, settings),
            replay=Replay(gateway.submitter, client, settings),
            cache=Cache(client, settings),
            statistics=Statistics(client, settings),
            rollouts=Rollouts(gateway.deployments, gateway.cluster, settings.repository),
        )

    def close(self) -> None:
        """Stop the threads and close every connection."""
        self.gateway.close()

    @property
    def repository(self) -> Repository:
        """The models, as this process read them last."""
        return self.catalog.repository

    def loaded(self, max_age_s: float = Cluster.CACHE_S) -> dict[str, set[int]]:
        """Return the versions that ready workers have loaded, by model.

        Args:
          max_age_s: as `Cluster.workers`.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        models: dict[str, set[int]] = {}
        for report in self.cluster.workers(max_age_s):
            if report.state == "ready":
                for model, versions in report.models.items():
                    models.setdefault(model, set()).update(versions)
        return models

    def failed(self) -> dict[str, dict[int, str]]:
        """Return why a ready worker could not load a version, by model and version.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        reasons: dict[str, dict[int, str]] = {}
        for report in self.cluster.workers():
            for model, held in report.held.items():
                for version, state in held.items():
                    if report.state == "ready" and state.error is not None:
                        why = f"worker {report.label}: {for_callers(state.error)}"
                        reasons.setdefault(model, {}).setdefault(version, why)
        return reasons

    def missing_models(self) -> list[str]:
        """Return the models that no ready worker serves, and ensembles with such a stage.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        served = self.repository.ready(self.loaded().__contains__)
        return [name for name in self.repository.models if name not in served]


def services() -> Services:
    """Return the services of the running app."""
    found: Services = current_app.extensions["inferno"]
    return found
