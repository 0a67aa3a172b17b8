"""What every route needs, made once per process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import redis
from flask import current_app

from inferno.errors import InvalidInput, Overloaded
from inferno.protocol.requests import InferRequest
from inferno.protocol.signature import Limits
from inferno.protocol.tensors import Tensors
from inferno.protocol.webhooks import check_reach
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import Settings
from tasks.broker.connection import connect
from tasks.celery import app as celery_app
from tasks.control.deadlines import Deadlines, is_late
from tasks.control.replay import Replay
from tasks.control.rollout import Rollouts
from tasks.control.tasks import Control
from tasks.intake.catalog import Catalog
from tasks.intake.submit import Accepted, Submitter
from tasks.results.bridge import Bridge, Waiter
from tasks.state.cluster import Cluster
from tasks.state.dead import DeadLetters
from tasks.state.deployments import Deployments, Outdated
from tasks.state.kept_results import Cache
from tasks.state.outcomes import Outcome
from tasks.state.records import Record, Records
from tasks.state.statistics import Statistics
from tasks.state.transitions import Idempotency


class Valid(NamedTuple):
    """A request that may be published."""

    request: InferRequest
    #: The version that shall answer.
    package: Package
    inputs: Tensors
    #: Of what is wanted of the models, by which the version was chosen.
    generation: int


@dataclass(frozen=True)
class Services:
    """The web tier's view of the platform."""

    settings: Settings
    catalog: Catalog
    limits: Limits
    client: redis.Redis
    records: Records
    submitter: Submitter
    control: Control
    dead: DeadLetters
    replay: Replay
    cache: Cache
    statistics: Statistics
    cluster: Cluster
    deployments: Deployments
    rollouts: Rollouts
    bridge: Bridge
    deadlines: Deadlines

    @classmethod
    def build(cls, settings: Settings) -> Services:
        """Read the repository and prepare the connections; none is opened yet.

        Raises:
          PackageError: the model repository cannot be read.
        """
        client = connect(settings)
        deployments, cluster = Deployments(client, settings), Cluster(client, settings)
        records, dead = Records(client, settings), DeadLetters(client, settings)
        submitter = Submitter(celery_app, client, settings)
        control = Control(celery_app, client, settings)
        bridge = Bridge(client, records, settings.redis.prefix, "inferno-web")
        sizes = settings.limits
        return cls(
            settings=settings,
            catalog=Catalog(deployments, settings),
            limits=Limits(sizes.max_text_bytes, sizes.max_image_bytes, sizes.max_rows),
            client=client,
            records=records,
            submitter=submitter,
            control=control,
            dead=dead,
            replay=Replay(submitter, dead),
            cache=Cache(client, settings),
            statistics=Statistics(client, settings),
            cluster=cluster,
            deployments=deployments,
            rollouts=Rollouts(deployments, cluster, settings.repository),
            bridge=bridge,
            deadlines=Deadlines(bridge, records, control),
        )

    def close(self) -> None:
        """Close every connection."""
        self.deadlines.stop()
        self.bridge.stop()
        self.client.close()

    @property
    def repository(self) -> Repository:
        """The models, as they were known last."""
        return self.catalog.repository

    def validate(self, request: InferRequest) -> Valid:
        """Find the version that shall answer and check the inputs against its signature.

        Raises:
          ModelNotFound: no such model or version.
          InvalidField: its webhook must not be called.
          InvalidInput: names the field and the expectation.
        """
        if request.webhook is not None and not self.settings.webhooks.allow_private:
            check_reach(request.webhook)
        package, generation = self.catalog.choose(request.model, request.version, request.sticky)
        inputs = request.arrays(package.signature, self.limits)
        if package.manifest.batching.oversized == "refuse" and package.signature.batched:
            most = package.max_batch_size(self.settings.batching.max_batch_size)
            rows = max(len(array) for array in inputs.values())
            if rows > most:
                raise InvalidInput(f"expected at most {most} rows, got {rows}", "inputs")
        return Valid(request, package, inputs, generation)

    def submit(
        self,
        request: InferRequest,
        idempotency: Idempotency | None = None,
        task_id: str | None = None,
    ) -> Accepted:
        """Validate a request and publish its task.

        Args:
          request: what the client asked for.
          idempotency: as `publish`.
          task_id: as `publish`.
        Raises:
          RequestError: it is wrong.
          ServingError: as `publish`.
        """
        return self.publish(self.validate(request), task_id, idempotency)

    def publish(
        self,
        valid: Valid,
        task_id: str | None = None,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        """Publish the task of a validated request, unless it could not start in time.

        Args:
          valid: what `validate` returned for it; if another version shall answer by now, the
            request is validated again.
          task_id: chosen beforehand by a caller who expects its outcome already.
          idempotency: returns the earlier task if there is one.
        Raises:
          KeyReused: the idempotency key belongs to another request.
          Overloaded: the predicted wait is longer than the deadline.
          BrokerUnavailable: Redis does not answer; the task was not accepted.
          RequestError: the version that shall answer by now does not take the request.
        """
        while True:
            try:
                return self._publish(valid, task_id, idempotency)
            except Outdated:
                self.catalog.refresh(packages=False)
                valid = self.validate(valid.request)

    def _publish(
        self, valid: Valid, task_id: str | None, idempotency: Idempotency | None
    ) -> Accepted:
        request, package, inputs, generation = valid
        tasks = self.settings.tasks
        deadline_s = (request.timeout_ms or tasks.timeout_ms or 0.0) / 1000
        hopeless = deadline_s and tasks.refuse_hopeless
        speed = self.cluster.speed(package.name) if hopeless else None
        try:
            task = self.submitter.submit(
                request,
                package,
                inputs,
                task_id,
                idempotency=idempotency,
                most_waiting=None if speed is None else speed.most_waiting(deadline_s),
                reply_to=None if task_id is None else self.bridge.reply_to,
                generation=generation,
            )
        except Overloaded as exc:
            assert speed is not None
            wait_s = speed.wait_s(exc.waiting)
            error = Overloaded(
                f"{exc.waiting} tasks are ahead of it: it would wait for about {wait_s:.1f} s, "
                f"and has to start within {deadline_s:g} s",
                "timeout_ms",
            )
            error.retry_after_s = max(math.ceil(wait_s - deadline_s), 1)
            raise error from None
        if not task.replayed:
            return task
        record, _ = self.records.fetch(task.task_id)
        if record is None:
            return task
        return msgspec.structs.replace(
            task,
            version=record.version,
            accepted_at=record.accepted_at,
            deadline=record.deadline,
        )

    def fetch(self, task_id: str, wait_s: float = 0.0) -> tuple[Record | None, Outcome | None]:
        """Return a task's record and outcome, as far as they are there.

        Args:
          task_id: which; if its deadline has passed while no worker had it, it is ended first.
          wait_s: how long to wait for its end, in seconds.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        record, outcome = self.records.fetch(task_id)
        if record is not None and is_late(record):
            self.control.expire(record)
            record, outcome = self.records.fetch(task_id)
        if wait_s and outcome is None and record is not None and not record.state.terminal:
            with Waiter(self.bridge, task_id) as waiter:
                self.deadlines.watch(task_id, record.deadline)
                waiter.wait(wait_s)
            record, outcome = self.records.fetch(task_id)
        return record, outcome

    def unserved(self, package: Package) -> str | None:
        """Return a model that no ready worker serves, of those that answer for a version.

        Args:
          package: the version; of an ensemble, the models of its stages are needed as well.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """

        def serves(model: str) -> bool:
            # One may have become ready since this was read last, as another process knows.
            return self.cluster.serves(model) or self.cluster.serves(model, 0.0)

        missing = self.repository.missing(package, serves)
        return missing[0] if missing else None

    def loaded(self, max_age_s: float = Cluster.CACHE_S) -> dict[str, set[int]]:
        """Return the loaded versions of each model that a ready worker serves.

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
                        why = f"{report.worker}: {state.error}"
                        reasons.setdefault(model, {}).setdefault(version, why)
        return reasons


def services() -> Services:
    """Return the services of the running app."""
    found: Services = current_app.extensions["inferno"]
    return found
