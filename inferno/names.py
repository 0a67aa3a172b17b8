"""Names that several processes share: lanes, Celery tasks and Redis keys.

A model's lane is the Celery queue with the model's name, so ``celery worker -Q <model>`` reads
naturally. The Celery task that runs a model is ``infer.<model>``.
"""

from __future__ import annotations

import re
import secrets
import uuid
from functools import cache

#: Allowed model names; a name becomes a queue, a folder and part of URLs.
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

TASK_PREFIX = "infer."

#: UUID namespace of the ids of stages' tasks.
_STAGES = uuid.UUID("0a4f2b6c-6e0e-4a57-9d55-7a1c6f0f6d11")

#: Queue of the webhooks that wait for delivery.
WEBHOOK_QUEUE = "webhooks"

#: Queues that are not lanes: webhooks, and Celery's remote control, events and replies.
RESERVED = re.compile(rf"{WEBHOOK_QUEUE}|.*\.pidbox|celeryev\..*|[0-9a-f]{{8}}-[0-9a-f-]{{27}}")

#: Celery task that delivers one webhook.
WEBHOOK_TASK = "webhooks.deliver"


def task_name(model: str) -> str:
    """Return the name of the Celery task that runs a model."""
    return TASK_PREFIX + model


def lane(task: str) -> str | None:
    """Return the lane of a Celery task, or None for a task that runs no model."""
    return task[len(TASK_PREFIX) :] if task.startswith(TASK_PREFIX) else None


def stage_task_id(task_id: str, stage: str) -> str:
    """Return the id of a stage's task. It never changes, so the task is made only once.

    Args:
      task_id: id of the ensemble's task.
      stage: name of the stage.
    """
    return str(uuid.uuid5(_STAGES, f"{task_id}/{stage}"))


@cache
def worker_label() -> str:
    """Return a name of this worker process for callers, which tells nothing of its machine."""
    return secrets.token_hex(4)


def result_key(task_id: str) -> str:
    """Return the key of a task's result. In Celery, it is also the channel that announces it."""
    return f"celery-task-meta-{task_id}"


def reply_channel(prefix: str, process: str) -> str:
    """Return the channel that tells a process about the tasks its clients wait for."""
    return f"{prefix}replies:{process}"


def record_key(prefix: str, task_id: str) -> str:
    """Return the key of a task's record."""
    return f"{prefix}task:{task_id}"


def index_key(prefix: str) -> str:
    """Return the key of the sorted set of the newest tasks, by time of acceptance."""
    return f"{prefix}tasks"


def payload_key(prefix: str, task_id: str) -> str:
    """Return the key of a finished task's request, if the settings keep it."""
    return f"{prefix}payload:{task_id}"


def claim_key(prefix: str, task_id: str) -> str:
    """Return the key of a task's inputs that are too large for its message."""
    return f"{prefix}claim:{task_id}"


def idempotency_key(prefix: str, digest: str) -> str:
    """Return the key that maps an Idempotency-Key to its task."""
    return f"{prefix}idempotency:{digest}"


def dead_key(prefix: str, task_id: str) -> str:
    """Return the key of a task's dead letter."""
    return f"{prefix}dead:{task_id}"


def dead_index_key(prefix: str) -> str:
    """Return the key of the sorted set of dead letters, by time of failure."""
    return f"{prefix}dead"


def counters_key(prefix: str) -> str:
    """Return the key of the hash of counters that the Lua scripts increment."""
    return f"{prefix}counters"


def statistics_key(prefix: str, model: str, version: int) -> str:
    """Return the key of the hash of a version's statistics."""
    return f"{prefix}statistics:{model}/{version}"


def workers_key(prefix: str) -> str:
    """Return the key of the hash that holds each worker's last report."""
    return f"{prefix}workers"


def deployments_key(prefix: str) -> str:
    """Return the key of the hash of the models' desired state; also the channel of its changes."""
    return f"{prefix}model_state"


def packages_key(prefix: str) -> str:
    """Return the key of the hash of the digests of loaded versions."""
    return f"{prefix}packages"


def cache_keys(prefix: str) -> str:
    """Return the prefix of the keys of kept results and shared computations."""
    return f"{prefix}cache:"
