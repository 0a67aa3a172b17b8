"""Names that more than one process must agree on.

The lane of a model is the Celery queue with the model's own name, so that ``celery worker -Q
<model>`` reads naturally. The Celery task that runs a model is `infer.<model>`.
"""

from __future__ import annotations

import re
import uuid

#: What a model may be called: it becomes a queue's name, a folder and part of URLs.
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

TASK_PREFIX = "infer."

#: Tells the ids of stages' tasks from others that are made in the same way.
_STAGES = uuid.UUID("0a4f2b6c-6e0e-4a57-9d55-7a1c6f0f6d11")

#: The queue of webhooks that wait for their delivery, and the Celery task that delivers one.
WEBHOOK_QUEUE = "webhooks"

#: Names of queues that are not lanes: that of webhooks, and those of Celery's remote control,
#: events and replies.
RESERVED = re.compile(rf"{WEBHOOK_QUEUE}|.*\.pidbox|celeryev\..*|[0-9a-f]{{8}}-[0-9a-f-]{{27}}")
WEBHOOK_TASK = "webhooks.deliver"


def task_name(model: str) -> str:
    """Return the name of the Celery task that runs a model."""
    return TASK_PREFIX + model


def lane(task: str) -> str | None:
    """Return the lane of a Celery task by its name, or None when it runs no model."""
    return task[len(TASK_PREFIX) :] if task.startswith(TASK_PREFIX) else None


def stage_task_id(task_id: str, stage: str) -> str:
    """Return the id of the task of an ensemble's stage: always the same, so that it is made once.

    Args:
      task_id: of the ensemble's task.
      stage: its name.
    """
    return str(uuid.uuid5(_STAGES, f"{task_id}/{stage}"))


def result_key(task_id: str) -> str:
    """Return the key of a task's result, by Celery's rule also the channel it is announced on."""
    return f"celery-task-meta-{task_id}"


def reply_channel(prefix: str, process: str) -> str:
    """Return the channel on which a process is told of the tasks that its clients wait for."""
    return f"{prefix}replies:{process}"


def record_key(prefix: str, task_id: str) -> str:
    """Return the key of a task's record."""
    return f"{prefix}task:{task_id}"


def index_key(prefix: str) -> str:
    """Return the key of the sorted set of the newest tasks, by the time of their acceptance."""
    return f"{prefix}tasks"


def payload_key(prefix: str, task_id: str) -> str:
    """Return the key of what a finished task was asked, where policy keeps it."""
    return f"{prefix}payload:{task_id}"


def claim_key(prefix: str, task_id: str) -> str:
    """Return the key of a task's inputs, where they are too large for its message."""
    return f"{prefix}claim:{task_id}"


def idempotency_key(prefix: str, digest: str) -> str:
    """Return the key that remembers which task an Idempotency-Key made."""
    return f"{prefix}idempotency:{digest}"


def dead_key(prefix: str, task_id: str) -> str:
    """Return the key of a task's dead letter."""
    return f"{prefix}dead:{task_id}"


def dead_index_key(prefix: str) -> str:
    """Return the key of the sorted set of dead letters, by the time of their failure."""
    return f"{prefix}dead"


def counters_key(prefix: str) -> str:
    """Return the key of the hash of counters that scripts keep."""
    return f"{prefix}counters"


def statistics_key(prefix: str, model: str, version: int) -> str:
    """Return the key of the hash of what the tasks of a version have come to."""
    return f"{prefix}statistics:{model}/{version}"


def workers_key(prefix: str) -> str:
    """Return the key of the hash that holds each worker's last report."""
    return f"{prefix}workers"


def deployments_key(prefix: str) -> str:
    """Return the key of the hash of what is wanted of the models, also the channel of changes."""
    return f"{prefix}model_state"


def packages_key(prefix: str) -> str:
    """Return the key of the hash that holds the digest of each version that workers have loaded."""
    return f"{prefix}packages"


def cache_keys(prefix: str) -> str:
    """Return what the keys of kept results, and of tasks that share a computation, begin with."""
    return f"{prefix}cache:"
