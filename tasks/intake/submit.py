"""Submit a validated request (step "submit"): its record and message appear together or not at all.

The message is an ordinary Celery task, `infer.<model>` with keyword arguments. Any Celery client
can send the same::

    app.send_task("infer.sentiment", kwargs={"inputs": {"text": "Good."}}, queue="sentiment")
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import redis
from celery import Celery

from inferno import names
from inferno.errors import BrokerUnavailable, FateUnknown
from inferno.protocol import packing, tensors
from inferno.protocol.requests import InferRequest
from inferno.protocol.tasks import TaskState
from inferno.protocol.tensors import Tensors
from inferno.repository.package import Package
from inferno.settings import Settings
from tasks.broker import webhook_message
from tasks.broker.connection import UNAVAILABLE, never_sent, translated
from tasks.broker.lanes import Lanes, TaskMessage
from tasks.intake.convoy import Convoy
from tasks.intake.reserve import Reserve
from tasks.state import claims
from tasks.state.claims import Claim
from tasks.state.outcomes import Outcome
from tasks.state.records import Record
from tasks.state.sharing import Sharing
from tasks.state.transitions import Admitted, Arrival, Idempotency, Refusal, Transitions

logger = logging.getLogger(__name__)


class Accepted(msgspec.Struct, frozen=True):
    """A task that is safely in its lane, or over already."""

    task_id: str
    model: str
    #: Version of the model; None when the worker chooses it.
    version: int | None
    #: Seconds since the epoch.
    accepted_at: float
    #: Latest start of the forward pass, in seconds since the epoch.
    deadline: float | None = None
    #: Whether an earlier request with the same Idempotency-Key had made the task.
    replayed: bool = False
    #: Outcome of a task that a kept result answered at once.
    outcome: Outcome | None = None


class Submission(msgspec.Struct, frozen=True):
    """A task that is submitted together with others: a stage of an ensemble."""

    request: InferRequest
    #: Version that answers.
    package: Package
    #: Inputs as arrays, from `InferRequest.arrays`.
    inputs: Tensors
    task_id: str
    #: Id of the ensemble's task, if this one is a stage.
    parent: str | None = None
    #: Deployment generation under which the version was chosen.
    generation: int | None = None


def new_task_id() -> str:
    """Return a new task id: a random UUID (version 4)."""
    return str(uuid.uuid4())


class Submitter:
    """Publishes tasks by name; it never loads a model."""

    def __init__(self, app: Celery, client: redis.Redis, settings: Settings) -> None:
        """Store where tasks are published.

        Args:
          app: Celery app whose broker carries the lanes.
          client: the Redis that holds the records; answers in bytes.
          settings: default deadline, and lifetimes of records.
        """
        self._lanes = Lanes(app, client, settings)
        self._transitions = Transitions(client, settings)
        self._arrivals = Convoy(self._transitions.accept)
        self._reserve = Reserve(client, settings)
        self._prefix = settings.redis.prefix
        self._timeout_ms = settings.tasks.timeout_ms
        # On other brokers, the record and the message are two steps, so the message holds all.
        self._claim_bytes = settings.tasks.claim_bytes if self._lanes.streams else 0
        self._sharing_enabled = settings.cache.enabled

    def submit(
        self,
        request: InferRequest,
        package: Package,
        inputs: Tensors,
        task_id: str | None = None,
        *,
        idempotency: Idempotency | None = None,
        most_waiting: int | None = None,
        reply_to: str | None = None,
        generation: int | None = None,
    ) -> Accepted:
        """Publish a validated request; when this returns, the task is in its lane.

        Args:
          request: the client's request.
          package: version that answers.
          inputs: inputs as arrays, from `InferRequest.arrays`.
          task_id: id of the task, if the caller waits for its outcome already.
          idempotency: the request's key; a repeated key returns the earlier task.
          most_waiting: refuse the task if more tasks are ahead of it in its lane (Redis Streams
            only).
          reply_to: channel of the process that waits for the outcome, if any.
          generation: deployment generation under which the version was chosen.
        Raises:
          Outdated: the generation has changed.
          BrokerUnavailable: Redis does not answer or is nearly full; the task was not accepted.
          FateUnknown: Redis was lost before it answered.
          KeyReused: the idempotency key belongs to another request.
          Overloaded: more tasks are ahead of it.
        """
        message, sharing, claim = self._message(request, package, inputs, task_id or new_task_id())
        message, arrival = self._arrival(
            message,
            timeout_ms=request.timeout_ms or self._timeout_ms,
            idempotency=idempotency,
            most_waiting=most_waiting,
            reply_to=reply_to,
            sharing=sharing,
            claim=claim,
            generation=generation,
        )
        self._take_room(arrival)
        return self._accept(message, arrival)

    def submit_all(
        self, submissions: Sequence[Submission], reply_to: str
    ) -> list[Accepted | Exception]:
        """Publish many validated requests together; a task that exists already stays as it is.

        They belong to tasks that were accepted, so they may use the reserve of a Redis that is
        nearly full.

        Args:
          submissions: the tasks.
          reply_to: channel of the process that waits for the outcomes.
        Returns:
          for each submission the task, or why it was refused.
        Raises:
          BrokerUnavailable: Redis does not answer; trying again is safe.
        """
        prepared = []
        for one in submissions:
            message, sharing, claim = self._message(
                one.request, one.package, one.inputs, one.task_id
            )
            prepared.append(
                self._arrival(
                    message,
                    timeout_ms=one.request.timeout_ms or self._timeout_ms,
                    parent=one.parent,
                    reply_to=reply_to,
                    sharing=sharing,
                    claim=claim,
                    generation=one.generation,
                )
            )
        answers: list[Admitted | Refusal] = []
        with translated():
            for start in range(0, len(prepared), Convoy.MOST):
                some = prepared[start : start + Convoy.MOST]
                answers += self._transitions.accept([arrival for _, arrival in some])
        return [
            answer if isinstance(answer, Exception) else self._accepted(message, arrival, answer)
            for (message, arrival), answer in zip(prepared, answers, strict=True)
        ]

    def _message(
        self, request: InferRequest, package: Package, inputs: Tensors, task_id: str
    ) -> tuple[TaskMessage, Sharing | None, Claim | None]:
        """Return the message of a request, how it may share, and its claim if it has one."""
        kwargs: dict[str, Any] = {"version": package.version}
        claim = None
        if 0 < self._claim_bytes < packing.size(inputs):
            claim = Claim(names.claim_key(self._prefix, task_id), packing.pack(inputs))
            kwargs[claims.ARGUMENT] = claims.shapes(inputs)
        else:
            kwargs["inputs"] = {
                name: tensors.encode(array, package.signature.input(name).dtype, "base64")
                for name, array in inputs.items()
            }
        if request.outputs is not None:
            kwargs["outputs"] = request.outputs
        if request.codec is not None:
            kwargs["codec"] = request.codec
        if request.webhook is not None:
            kwargs["webhook"] = {"url": request.webhook, "events": request.webhook_events}
        sharing = None
        if not request.cache:
            kwargs["cache"] = False
        elif self._sharing_enabled and self._lanes.streams:
            sharing = Sharing.of(package, inputs, request.outputs, request.codec)
            if sharing is not None:
                kwargs["cache"] = sharing.key
        message = TaskMessage(
            queue=package.name,
            name=names.task_name(package.name),
            task_id=task_id,
            kwargs=kwargs,
            priority=request.priority,
            kwargsrepr=", ".join(f"{name}: {list(array.shape)}" for name, array in inputs.items()),
        )
        return message, sharing, claim

    def earlier(self, idempotency: Idempotency) -> str | None:
        """Return the id of the task that an Idempotency-Key has made, or None.

        Raises:
          BrokerUnavailable: Redis does not answer.
          KeyReused: the idempotency key belongs to another request.
        """
        with translated():
            return self._transitions.earlier(idempotency)

    def repeat(
        self, record: Record, kwargs: dict[str, Any], idempotency: Idempotency | None = None
    ) -> Accepted:
        """Publish an earlier task again, as a new task, even if Redis is nearly full.

        Args:
          record: record of the earlier task.
          kwargs: keyword arguments of its message.
          idempotency: the request's key; a repeated key returns the task that it made first.
        Raises:
          BrokerUnavailable: Redis does not answer; the task was not accepted.
          FateUnknown: Redis was lost before it answered.
          PayloadGone: the inputs have been deleted.
        """
        task_id, claim = new_task_id(), None
        if claims.is_claim(kwargs):
            source = names.claim_key(self._prefix, record.task_id)
            claim = Claim(names.claim_key(self._prefix, task_id), source=source)
        message = TaskMessage(
            queue=record.model,
            name=names.task_name(record.model),
            task_id=task_id,
            kwargs=dict(kwargs),
            priority=record.priority,
            kwargsrepr=f"replay of {record.task_id}",
        )
        message, arrival = self._arrival(
            message,
            timeout_ms=self._timeout_ms,
            idempotency=idempotency,
            replay_of=record.task_id,
            claim=claim,
        )
        return self._accept(message, arrival)

    def _take_room(self, arrival: Arrival) -> None:
        """Claim memory of Redis for a new task.

        Raises:
          BrokerUnavailable: Redis is nearly full, or does not answer.
          KeyReused: the idempotency key belongs to another request.
        """
        inputs = 0 if arrival.claim is None else len(arrival.claim.payload)
        try:
            self._reserve.take(len(arrival.payload) + inputs)
        except BrokerUnavailable:
            # A repeated request makes no new task.
            if arrival.idempotency is None or self.earlier(arrival.idempotency) is None:
                raise

    def _accept(self, message: TaskMessage, arrival: Arrival) -> Accepted:
        with translated():
            try:
                admitted = self._arrivals.call(arrival)
            except (redis.ConnectionError, redis.TimeoutError) as exc:
                if never_sent(exc):
                    raise
                # Redis may have accepted it before the connection was lost. Repeating is harmless.
                admitted = self._accept_again(arrival)
        if isinstance(admitted, Exception):
            try:
                raise admitted
            finally:
                # The error now holds this frame, and with it the inputs.
                del admitted
        return self._accepted(message, arrival, admitted)

    def _arrival(
        self,
        message: TaskMessage,
        *,
        timeout_ms: float | None,
        idempotency: Idempotency | None = None,
        most_waiting: int | None = None,
        replay_of: str | None = None,
        parent: str | None = None,
        reply_to: str | None = None,
        sharing: Sharing | None = None,
        claim: Claim | None = None,
        generation: int | None = None,
    ) -> tuple[TaskMessage, Arrival]:
        now = time.time()
        # Workers need it to see how long the task has waited.
        message.kwargs["accepted_at"] = now
        expires = timeout_ms / 1000 if timeout_ms else None
        message = msgspec.structs.replace(message, expires=expires)
        webhook = message.kwargs.get("webhook") or {}
        record = Record(
            task_id=message.task_id,
            model=message.queue,
            version=message.kwargs.get("version"),
            state=TaskState.QUEUED,
            accepted_at=now,
            priority=message.priority,
            deadline=now + timeout_ms / 1000 if timeout_ms else None,
            replay_of=replay_of,
            parent=parent,
            webhook=webhook.get("url"),
            webhook_events=tuple(webhook.get("events") or ()),
            reply_to=reply_to,
            shared=None if sharing is None else sharing.key,
        )
        if sharing is not None and "completed" in record.webhook_events:
            sharing = self._with_webhook(sharing, record)
        return message, Arrival(
            record,
            self._lanes.key(message.queue),
            self._lanes.pack(message),
            idempotency,
            most_waiting,
            sharing,
            claim,
            generation,
        )

    def _accepted(self, message: TaskMessage, arrival: Arrival, admitted: Admitted) -> Accepted:
        record, task_id = arrival.record, admitted.task_id
        replayed = task_id != message.task_id
        if not replayed and not arrival.lane:
            self._publish(message, arrival.idempotency)
        return Accepted(
            task_id,
            record.model,
            record.version,
            record.accepted_at,
            record.deadline,
            replayed,
            admitted.outcome,
        )

    def _with_webhook(self, sharing: Sharing, record: Record) -> Sharing:
        """Add the webhook that is sent if another task's result answers this one."""
        assert record.webhook is not None
        message = webhook_message.message(
            record.webhook, record.task_id, "completed", record.model, record.version
        )
        packed, lane = self._lanes.pack(message), self._lanes.key(message.queue)
        return replace(sharing, webhook=packed, webhook_lane=lane)

    def _accept_again(self, arrival: Arrival) -> Admitted | Refusal:
        try:
            return self._arrivals.call(arrival)
        except UNAVAILABLE as exc:
            raise FateUnknown(
                f"Redis was lost before it answered; /tasks/{arrival.record.task_id} will show "
                f"whether the task was accepted"
            ) from exc

    def _publish(self, message: TaskMessage, idempotency: Idempotency | None) -> None:
        """Publish a message whose record is written, on a broker that cannot do both at once."""
        try:
            self._lanes.send(message)
        except BrokerUnavailable:
            self._withdraw(message.task_id, idempotency)
            raise

    def _withdraw(self, task_id: str, idempotency: Idempotency | None) -> None:
        try:
            with translated():
                self._transitions.forget(task_id, idempotency)
        except BrokerUnavailable:
            # The record says `queued` until it expires.
            logger.warning("task %s was not accepted, but its record remains", task_id)
