"""The life of a task: its states, and what is known of it when it is over."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class TaskState(StrEnum):
    """Where a task stands. Values are what clients see."""

    #: Accepted, and waiting in its lane or in a worker's buffer.
    QUEUED = "queued"
    #: A forward pass with the task in it has started.
    RUNNING = "running"
    #: Failed for a passing reason; it waits to be tried again.
    RETRYING = "retrying"
    #: Over: the outputs can be fetched.
    SUCCEEDED = "succeeded"
    #: Over: the error says why.
    FAILED = "failed"
    #: Over: its client took it back.
    CANCELLED = "cancelled"
    #: Over: the forward pass did not start in time.
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether the task is over: a terminal state never changes."""
        return self in TERMINAL


TERMINAL = frozenset(
    {TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}
)

#: The states that may follow each state.
TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.QUEUED: frozenset(
        {TaskState.RUNNING, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}
    ),
    # A crash or a stopping worker hands a running task to another delivery, which runs it again.
    TaskState.RUNNING: frozenset({TaskState.RUNNING, TaskState.RETRYING} | TERMINAL),
    TaskState.RETRYING: frozenset(
        {TaskState.RUNNING, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}
    ),
    **{state: frozenset() for state in TERMINAL},
}


class Timings(msgspec.Struct, frozen=True):
    """Where a task's time went, in milliseconds."""

    #: From acceptance until a worker held it.
    queue_ms: float
    #: From there until its forward pass started.
    batch_wait_ms: float
    #: The forward pass, with preparing and splitting its batch.
    inference_ms: float
    #: From acceptance until its outcome was settled.
    total_ms: float


class BatchInfo(msgspec.Struct, frozen=True):
    """The batch that a task rode in."""

    id: str
    #: Tasks in it.
    size: int
    #: Rows in it: a task may have several.
    rows: int
    #: Why it left: `full`, `window`, `idle`, `deadline` or `isolated`.
    flush_reason: str
    #: What the forward pass was expected to take, in ms; 0 before anything was measured.
    predicted_ms: float
    #: What it took.
    run_ms: float


class StageRun(msgspec.Struct, frozen=True):
    """What an ensemble had from one of its stages."""

    name: str
    model: str
    version: int
    #: Of the stage's own task.
    task_id: str
    #: From when the stage could begin until the ensemble had its result.
    ms: float


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a finished task leaves, in the `result` of Celery's own format."""

    #: Tensors of the wire by name. Raw JSON in the web tier, which only passes them on.
    outputs: dict[str, Any] | msgspec.Raw
    model: str
    version: int
    timings: Timings
    batch: BatchInfo
    worker: str
    #: Whether it is the result of an earlier task, which was kept.
    cached: bool = False
    #: Of an ensemble, in the order in which they ended.
    stages: tuple[StageRun, ...] = ()
