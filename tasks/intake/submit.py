"""Accept one inference: its record and its message appear in one step, or not at all.

The message is an ordinary Celery task, `infer.<model>` with keyword arguments, so that any Celery
client can send the same::

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
from inferno.repository.repository import Package
from inferno.settings import Settings
from tasks.broker import webhook_message as notice
from tasks.broker.connection import UNAVAILABLE, never_sent, translated
from tasks.broker.lanes import Lanes, Message
from tasks.intake.convoy import Convoy
from tasks.state import claims
from tasks.state.claims import Claim
from tasks.state.outcomes import Outcome
from tasks.state.records import Record
from tasks.state.sharing import Sharing
from tasks.state.transitions import Admitted, Arrival, Idempotency, Refusal, Transitions

logger = logging.getLogger(__name__)


class Accepted(msgspec.Struct, frozen=True):
    """A task that is safely in its lane."""

    task_id: str
    model: str
    #: Of the model; None when the worker chooses it.
    version: int | None
    #: Seconds since the epoch.
    accepted_at: float
    #: The forward pass must have started by then; seconds since the epoch.
    deadline: float | None = None
    #: An earlier request with the same Idempotency-Key has made it.
    replayed: bool = False
    #: Of a task that was over at once: its result was there already.
    outcome: Outcome | None = None


class Submission(msgspec.Struct, frozen=True):
    """A task that one process submits together with others."""

    request: InferRequest
    #: The version that shall answer.
    package: Package
    #: What `InferRequest.arrays` made of its inputs.
    inputs: Tensors
    task_id: str
    #: The task of the ensemble that it is a stage of.
    parent: str | None = None
    #: Of what is wanted of the models, by which the version was chosen.
    generation: int | None = None


def new_task_id() -> str:
    """Return a new task id: a random UUID (version 4)."""
    return str(uuid.uuid4())


class Submitter:
    """Publishes tasks by name; it never loads a model."""

    def __init__(self, app: Celery, client: redis.Redis, settings: Settings) -> None:
        """Store where to publish to.

        Args:
          app: its broker carries the lanes.
          client: of the Redis that holds the records.
          settings: the default deadline, and how records are kept.
        """
        self._lanes = Lanes(app, client, settings)
        self._transitions = Transitions(client, settings)
        self._arrivals = Convoy(self._transitions.accept)
        self._prefix = settings.redis.prefix
        self._timeout_ms = settings.tasks.timeout_ms
        # Other brokers take messages in a step of their own; there they hold all that is needed.
        self._claim_bytes = settings.tasks.claim_bytes if self._lanes.streams else 0
        self._shares = settings.cache.enabled

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
          request: what the client asked for.
          package: the version that shall answer.
          inputs: what `InferRequest.arrays` made of its inputs.
          task_id: chosen beforehand by a caller who waits for it already.
          idempotency: returns the earlier task if there is one.
          most_waiting: refuse if more tasks are ahead of it in its lane; only streams can tell.
          reply_to: the channel of the process that waits for the outcome, if one does.
          generation: of what is wanted of the models, by which the version was chosen.
        Raises:
          Outdated: that is another one by now.
          BrokerUnavailable: Redis does not answer; the task was not accepted.
          FateUnknown: Redis was lost before it answered.
          KeyReused: the idempotency key belongs to another request.
          Overloaded: more tasks are ahead of it.
        """
        message, sharing, claim = self._asked(request, package, inputs, task_id or new_task_id())
        return self._accept(
            message,
            timeout_ms=request.timeout_ms or self._timeout_ms,
            idempotency=idempotency,
            most_waiting=most_waiting,
            reply_to=reply_to,
            sharing=sharing,
            claim=claim,
            generation=generation,
        )

    def submit_all(
        self, submissions: Sequence[Submission], reply_to: str
    ) -> list[Accepted | Exception]:
        """Publish many validated requests together; tasks that are known stay as they are.

        Args:
          submissions: what is asked for.
          reply_to: the channel of the process that waits for the outcomes.
        Returns:
          for each its task, or why it is refused.
        Raises:
          BrokerUnavailable: Redis does not answer; it is safe to try again.
        """
        asked = []
        for one in submissions:
            message, sharing, claim = self._asked(one.request, one.package, one.inputs, one.task_id)
            asked.append(
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
            for start in range(0, len(asked), Convoy.MOST):
                some = asked[start : start + Convoy.MOST]
                answers += self._transitions.accept([arrival for _, arrival in some])
        return [
            answer if isinstance(answer, Exception) else self._accepted(message, arrival, answer)
            for (message, arrival), answer in zip(asked, answers, strict=True)
        ]

    def _asked(
        self, request: InferRequest, package: Package, inputs: Tensors, task_id: str
    ) -> tuple[Message, Sharing | None, Claim | None]:
        """Return the message of a request, what it shares, and its inputs if they stay outside."""
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
        elif self._shares and self._lanes.streams:
            sharing = Sharing.of(package, inputs, request.outputs, request.codec)
            if sharing is not None:
                kwargs["cache"] = sharing.key
        message = Message(
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
        """Publish again, as a new task, what an earlier one was asked.

        Args:
          record: of the earlier task.
          kwargs: of its message.
          idempotency: returns the task that it has made before, if there is one.
        Raises:
          BrokerUnavailable: Redis does not answer; the task was not accepted.
          FateUnknown: Redis was lost before it answered.
          PayloadGone: its inputs have been deleted.
        """
        task_id, claim = new_task_id(), None
        if claims.is_claim(kwargs):
            source = names.claim_key(self._prefix, record.task_id)
            claim = Claim(names.claim_key(self._prefix, task_id), source=source)
        message = Message(
            queue=record.model,
            name=names.task_name(record.model),
            task_id=task_id,
            kwargs=dict(kwargs),
            priority=record.priority,
            kwargsrepr=f"replay of {record.task_id}",
        )
        return self._accept(
            message,
            timeout_ms=self._timeout_ms,
            idempotency=idempotency,
            replay_of=record.task_id,
            claim=claim,
        )

    def _accept(
        self, message: Message, *, idempotency: Idempotency | None = None, **facts: Any
    ) -> Accepted:
        message, arrival = self._arrival(message, idempotency=idempotency, **facts)
        with translated():
            try:
                admitted = self._arrivals.call(arrival)
            except (redis.ConnectionError, redis.TimeoutError) as exc:
                if never_sent(exc):
                    raise
                # Redis may have done it before the connection was lost; repeating does no harm.
                admitted = self._accept_again(arrival)
        if isinstance(admitted, Exception):
            raise admitted
        return self._accepted(message, arrival, admitted)

    def _arrival(
        self,
        message: Message,
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
    ) -> tuple[Message, Arrival]:
        now = time.time()
        # The time travels with the message: workers see how long a task has waited.
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
            sharing = self._told(sharing, record)
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

    def _accepted(self, message: Message, arrival: Arrival, admitted: Admitted) -> Accepted:
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

    def _told(self, sharing: Sharing, record: Record) -> Sharing:
        """Add the webhook that is sent if another task's result answers this one."""
        assert record.webhook is not None
        message = notice.message(
            record.webhook, record.task_id, "completed", record.model, record.version
        )
        packed, lane = self._lanes.pack(message), self._lanes.key(message.queue)
        return replace(sharing, webhook=packed, webhook_lane=lane)

    def _accept_again(self, arrival: Arrival) -> Admitted | Refusal:
        try:
            return self._arrivals.call(arrival)
        except UNAVAILABLE as exc:
            raise FateUnknown(
                f"Redis was lost before it answered; whether the task was accepted will show at "
                f"/tasks/{arrival.record.task_id}"
            ) from exc

    def _publish(self, message: Message, idempotency: Idempotency | None) -> None:
        """Publish after the record was written, on a broker that cannot do both in one step."""
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
            # The record expires by itself; it says `queued` until then.
            logger.warning("task %s was not accepted, but its record remains", task_id)
