"""Accept one inference: write its record and publish its message to the model's lane.

The message is an ordinary Celery task, `infer.<model>` with keyword arguments, so that any Celery
client can send the same::

    app.send_task("infer.sentiment", kwargs={"inputs": {"text": "Good."}}, queue="sentiment")
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import redis
from celery import Celery

from inferno import names
from inferno.errors import BrokerUnavailable
from inferno.protocol import tensors
from inferno.protocol.requests import MAX_PRIORITY, InferRequest
from inferno.protocol.tasks import TaskState
from inferno.protocol.tensors import Tensors
from inferno.repository import Package
from inferno.settings import Settings
from tasks.connection import translated
from tasks.records import Record, Records


@dataclass(frozen=True)
class Accepted:
    """A task that is safely in its lane."""

    task_id: str
    model: str
    version: int
    #: Seconds since the epoch.
    accepted_at: float


def new_task_id() -> str:
    """Return an id for a task that is about to be submitted."""
    return str(uuid.uuid4())


class Submitter:
    """Publishes tasks by name; it never loads a model."""

    def __init__(self, app: Celery, client: redis.Redis, settings: Settings) -> None:
        """Store where to publish to.

        Args:
          app: its broker carries the lanes.
          client: for the records.
          settings: the default deadline.
        """
        self._app = app
        self._records = Records(client, settings)
        self._timeout_ms = settings.tasks.timeout_ms
        #: Lanes that the broker knows of.
        self._declared: set[str] = set()

    def submit(
        self, request: InferRequest, package: Package, inputs: Tensors, task_id: str | None = None
    ) -> Accepted:
        """Publish a validated request; when this returns, the task is in its lane.

        Args:
          request: what the client asked for.
          package: the version that shall answer.
          inputs: what `InferRequest.arrays` made of its inputs.
          task_id: chosen beforehand by a caller who waits for it already.
        Raises:
          BrokerUnavailable: Redis does not answer; the task was not accepted.
        """
        accepted = Accepted(task_id or new_task_id(), package.name, package.version, time.time())
        self._records.create(
            Record(
                task_id=accepted.task_id,
                model=package.name,
                version=package.version,
                state=TaskState.QUEUED,
                accepted_at=accepted.accepted_at,
                started_at=None,
                finished_at=None,
                attempts=0,
                priority=request.priority,
                batch_id=None,
            )
        )
        try:
            with translated():
                self._publish(request, package, inputs, accepted)
        except BrokerUnavailable:
            self._withdraw(accepted.task_id)
            raise
        return accepted

    def _publish(
        self, request: InferRequest, package: Package, inputs: Tensors, accepted: Accepted
    ) -> None:
        timeout_ms = request.timeout_ms or self._timeout_ms
        kwargs: dict[str, Any] = {
            "inputs": {
                name: tensors.encode(array, package.signature.input(name).dtype, "base64")
                for name, array in inputs.items()
            },
            "version": package.version,
            "accepted_at": accepted.accepted_at,
        }
        if request.outputs is not None:
            kwargs["outputs"] = request.outputs
        if request.codec is not None:
            kwargs["codec"] = request.codec
        name = names.task_name(package.name)
        message = self._app.amqp.as_task_v2(
            accepted.task_id,
            name,
            kwargs=kwargs,
            expires=timeout_ms / 1000 if timeout_ms else None,
            # What Flower shows; the inputs themselves may be large or private.
            argsrepr="",
            kwargsrepr=", ".join(f"{name}: {list(array.shape)}" for name, array in inputs.items()),
        )
        lane = self._app.amqp.queues[package.name]
        # `send_task` would route again, and subscribe to the result on a connection that all
        # threads share.
        with self._app.producer_or_acquire() as producer:
            self._app.amqp.send_task_message(
                producer,
                name,
                message,
                queue=lane,
                # Once is enough, and costs a quarter of a submit.
                declare=[] if lane.name in self._declared else [lane],
                priority=to_redis(request.priority),
            )
        self._declared.add(lane.name)

    def _withdraw(self, task_id: str) -> None:
        try:
            with translated():
                self._records.forget(task_id)
        except BrokerUnavailable:
            # The record expires by itself; it says `queued` until then.
            pass


def to_redis(priority: int) -> int:
    """Turn our priority, where higher is sooner, into Celery's on Redis, where 0 is soonest."""
    return MAX_PRIORITY - priority


def from_redis(priority: int | None) -> int:
    """Turn Celery's priority on Redis into ours."""
    return MAX_PRIORITY - priority if priority is not None else 0
