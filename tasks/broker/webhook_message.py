"""The message that asks for the delivery of a webhook; `workers.webhooks.deliver` runs it."""

from __future__ import annotations

import uuid

from inferno import names
from tasks.broker.lanes import TaskMessage


def message_id(task_id: str, event: str) -> str:
    """Return the `webhook-id`, the same for every delivery: receivers recognize repeated ones."""
    return f"{task_id}.{event}"


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
    kwargs = {
        "url": url,
        "task_id": task_id,
        "event": event,
        "model": model,
        "version": version,
        "occurred_at": occurred_at,
    }
    return TaskMessage(
        queue=names.WEBHOOK_QUEUE,
        name=names.WEBHOOK_TASK,
        task_id=str(uuid.uuid4()),
        kwargs=kwargs,
        # Not the URL: it may contain a token.
        kwargsrepr=message_id(task_id, event),
    )
