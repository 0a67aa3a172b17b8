"""What every route needs, made once per process."""

from __future__ import annotations

from dataclasses import dataclass

import redis
from flask import current_app

from inferno.errors import InvalidInput
from inferno.protocol.requests import InferRequest
from inferno.protocol.signature import Limits
from inferno.protocol.tensors import Tensors
from inferno.protocol.webhooks import check_reach
from inferno.repository import Package, Repository
from inferno.settings import Settings
from tasks.celery import app as celery_app
from tasks.cluster import Cluster
from tasks.connection import connect
from tasks.control import Control
from tasks.dead import DeadLetters
from tasks.records import Records
from tasks.submit import Accepted, Submitter
from web.bridge import Bridge
from web.peer import Peers

#: A socket that takes no data for so many ping intervals is cut off.
STALLED_PINGS = 2


@dataclass(frozen=True)
class Services:
    """The web tier's view of the platform."""

    settings: Settings
    repository: Repository
    limits: Limits
    client: redis.Redis
    records: Records
    submitter: Submitter
    control: Control
    dead: DeadLetters
    cluster: Cluster
    bridge: Bridge
    peers: Peers

    @classmethod
    def build(cls, settings: Settings) -> Services:
        """Read the repository and prepare the connections; none is opened yet.

        Raises:
          PackageError: the model repository cannot be read.
        """
        client = connect(settings)
        records = Records(client, settings)
        sizes = settings.limits
        return cls(
            settings=settings,
            repository=Repository.read(settings.repository),
            limits=Limits(sizes.max_text_bytes, sizes.max_image_bytes, sizes.max_rows),
            client=client,
            records=records,
            submitter=Submitter(celery_app, client, settings),
            control=Control(celery_app, client, settings),
            dead=DeadLetters(celery_app, client, settings),
            cluster=Cluster(client, settings),
            bridge=Bridge(client, records),
            peers=Peers(
                settings.websocket.max_queued_messages,
                STALLED_PINGS * settings.websocket.ping_interval_s,
            ),
        )

    def close(self) -> None:
        """Close every socket and connection."""
        self.peers.close()
        self.bridge.stop()
        self.client.close()

    def validate(self, request: InferRequest) -> tuple[Package, Tensors]:
        """Find the version that shall answer and check the inputs against its signature.

        Raises:
          ModelNotFound: no such model or version.
          InvalidField: its webhook must not be called.
          InvalidInput: names the field and the expectation.
        """
        if request.webhook is not None and not self.settings.webhooks.allow_private:
            check_reach(request.webhook)
        package = self.repository.model(request.model).package(request.version)
        inputs = request.arrays(package.signature, self.limits)
        if package.manifest.batching.oversized == "refuse" and package.signature.batched:
            most = package.max_batch_size(self.settings.batching.max_batch_size)
            rows = max(len(array) for array in inputs.values())
            if rows > most:
                raise InvalidInput(f"expected at most {most} rows, got {rows}", "inputs")
        return package, inputs

    def submit(self, request: InferRequest) -> Accepted:
        """Validate a request and publish its task.

        Raises:
          RequestError: it is wrong.
          BrokerUnavailable: Redis does not answer; the task was not accepted.
        """
        package, inputs = self.validate(request)
        return self.submitter.submit(request, package, inputs)

    def loaded(self) -> dict[str, set[int]]:
        """Return the loaded versions of each model that a ready worker serves.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        models: dict[str, set[int]] = {}
        for report in self.cluster.workers():
            if report.state == "ready":
                for model, versions in report.models.items():
                    models.setdefault(model, set()).update(versions)
        return models


def services() -> Services:
    """Return the services of the running app."""
    found: Services = current_app.extensions["inferno"]
    return found
