"""Names that more than one process must agree on.

The lane of a model is the Celery queue with the model's own name, so that ``celery worker -Q
<model>`` reads naturally. The Celery task that runs a model is `infer.<model>`.
"""

from __future__ import annotations

import re

#: What a model may be called: it becomes a queue's name, a folder and part of URLs.
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

TASK_PREFIX = "infer."

#: The queue of webhooks that wait for their delivery, and the Celery task that delivers one.
WEBHOOK_QUEUE = "webhooks"
WEBHOOK_TASK = "webhooks.deliver"


def task_name(model: str) -> str:
    """Return the name of the Celery task that runs a model."""
    return TASK_PREFIX + model


def lane(task: str) -> str | None:
    """Return the lane of a Celery task by its name, or None when it runs no model."""
    return task[len(TASK_PREFIX) :] if task.startswith(TASK_PREFIX) else None


def result_key(task_id: str) -> str:
    """Return the key of a task's result, by Celery's rule also the channel it is announced on."""
    return f"celery-task-meta-{task_id}"


def record_key(prefix: str, task_id: str) -> str:
    """Return the key of a task's record."""
    return f"{prefix}task:{task_id}"


def workers_key(prefix: str) -> str:
    """Return the key of the hash that holds each worker's last report."""
    return f"{prefix}workers"
