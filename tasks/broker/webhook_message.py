"""The message that asks for the delivery of a webhook; `workers.webhooks.deliver` runs it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from inferno import names
from inferno.errors import InvalidField
from tasks.broker.lanes import TaskMessage

#: 9999-12-31, in seconds since the epoch.
_LAST_TIME = 253402300799


class Webhook(msgspec.Struct, frozen=True):
    """One call of a URL about an event of a task; fields as in `message`."""

    url: str
    #: It becomes a part of a header. Programs that publish tasks themselves may choose any text.
    task_id: Annotated[str, Meta(pattern=r"^[!-~]{1,255}\Z")]
    event: Annotated[str, Meta(pattern=r"^(start|completed)\Z")]
    model: str
    version: int | None = None
    occurred_at: Annotated[float, Meta(ge=0, le=_LAST_TIME)] | None = None

    @property
    def id(self) -> str:
        """Its `webhook-id`."""
        return message_id(self.task_id, self.event)


def message_id(task_id: str, event: str) -> str:
    """Return the `webhook-id`, the same for every delivery: receivers recognize repeated ones."""
    return f"{task_id}.{event}"


def read(kwargs: Mapping[str, Any]) -> Webhook:
    """Return the webhook of a message's arguments, which any program may have published.

    Raises:
      InvalidField: they are wrong. The message does not repeat them.
    """
    try:
        return msgspec.convert(kwargs, Webhook)
    except msgspec.ValidationError as exc:
        raise InvalidField(f"the message cannot be read: {exc}", "webhook") from None


def message(
    url: str,
    task_id: str,
    event: str,
    model: str,
    version: int | None,
    occurred_at: float | None = None,
) -> TaskMessage:
    """Return the message of the Celery task that delivers a webhook.

    Args:
      url: where to send it, as the client wrote it.
      task_id: the task that the webhook is about.
      event: `start` or `completed`.
      model: of the task.
      version: of the model, where it is known.
      occurred_at: when it happened, in seconds since the epoch; None for the time at which the
        task's record says that it ended.
    """
    webhook = Webhook(url, task_id, event, model, version, occurred_at)
    return _message(webhook, str(uuid.uuid4()))


def later(webhook: Webhook, delivery_id: str, retries: int, eta: datetime) -> TaskMessage:
    """Return the message that delivers a webhook later.

    Args:
      webhook: what to deliver.
      delivery_id: Celery's id of the delivery.
      retries: attempts so far.
      eta: earliest time.
    """
    return msgspec.structs.replace(_message(webhook, delivery_id), retries=retries, eta=eta)


def _message(webhook: Webhook, delivery_id: str) -> TaskMessage:
    return TaskMessage(
        queue=names.WEBHOOK_QUEUE,
        name=names.WEBHOOK_TASK,
        task_id=delivery_id,
        kwargs=msgspec.structs.asdict(webhook),
        # Not the URL: it may contain a token.
        kwargsrepr=webhook.id,
    )
