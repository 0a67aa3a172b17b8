"""The message by which a webhook is delivered; `workers.webhooks.deliver` runs it."""

from __future__ import annotations

import uuid

from inferno import names
from tasks.broker.lanes import Message


def message_id(task_id: str, event: str) -> str:
    """Return the `webhook-id`: the same for every delivery, so that receivers can tell them."""
    return f"{task_id}.{event}"


def message(
    url: str,
    task_id: str,
    event: str,
    model: str,
    version: int | None,
    occurred_at: float | None = None,
) -> Message:
    """Return the message of the Celery task that delivers a webhook.

    Args:
      url: as the client gave it.
      task_id: of the task that it is about.
      event: `start` or `completed`.
      model: of the task.
      version: of the model, where it is known.
      occurred_at: when it happened, in seconds since the epoch; None for the time at which the
        task's record says that it ended.
    """
    kwargs = {
        "url": url,
        "task_id": task_id,
        "event": event,
        "model": model,
        "version": version,
        "occurred_at": occurred_at,
    }
    return Message(
        queue=names.WEBHOOK_QUEUE,
        name=names.WEBHOOK_TASK,
        task_id=str(uuid.uuid4()),
        kwargs=kwargs,
        # The URL may hold a token, and is not shown.
        kwargsrepr=message_id(task_id, event),
    )
