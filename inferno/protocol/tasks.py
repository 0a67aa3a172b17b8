"""The states of a task, and the documents that describe its result.

Step *settle*: a worker stores a `Result`. Step *deliver*: the web tier answers with it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from msgspec import Meta


class TaskState(StrEnum):
    """State of a task. Clients see the values."""

    #: Accepted; waits in its lane or in a worker's buffer.
    QUEUED = "queued"
    #: A forward pass with the task has started.
    RUNNING = "running"
    #: Failed with a transient error; waits for its next attempt.
    RETRYING = "retrying"
    #: Finished; the outputs can be fetched.
    SUCCEEDED = "succeeded"
    #: Finished; the error tells why.
    FAILED = "failed"
    #: Finished; a client cancelled it.
    CANCELLED = "cancelled"
    #: Finished; the forward pass did not start in time.
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether the task is finished; a terminal state never changes."""
        return self in TERMINAL


TERMINAL = frozenset(
    {TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}
)

#: Allowed next states, by state.
TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.QUEUED: frozenset(
        {TaskState.RUNNING, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}
    ),
    # After a crash, or when its worker stops, a running task is delivered and run again.
    TaskState.RUNNING: frozenset({TaskState.RUNNING, TaskState.RETRYING} | TERMINAL),
    TaskState.RETRYING: frozenset(
        {TaskState.RUNNING, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}
    ),
    **{state: frozenset() for state in TERMINAL},
}


class Timings(msgspec.Struct, frozen=True):
    """Times of a task's steps, in milliseconds."""

    queue_ms: Annotated[float, Meta(description="From acceptance until a worker held the task.")]
    batch_wait_ms: Annotated[
        float, Meta(description="From then until the forward pass of its batch started.")
    ]
    inference_ms: Annotated[
        float,
        Meta(
            description="Forward pass and splitting of its outputs; also preparing the batch, "
            "unless that was done while waiting for another pass."
        ),
    ]
    total_ms: Annotated[float, Meta(description="From acceptance until the task was settled.")]


class BatchInfo(msgspec.Struct, frozen=True):
    """The batch that a task ran in."""

    id: str
    size: Annotated[int, Meta(description="Number of tasks.")]
    rows: Annotated[int, Meta(description="Number of rows; a task may have several.")]
    flush_reason: Annotated[
        str,
        Meta(
            description="Why the batch was sent: `full`, `window`, `idle`, `deadline` or "
            "`isolated`."
        ),
    ]
    predicted_ms: Annotated[
        float,
        Meta(description="Predicted time of the pass in milliseconds; 0 before any measurement."),
    ]
    run_ms: Annotated[float, Meta(description="Actual time of the pass in milliseconds.")]


class StageRun(msgspec.Struct, frozen=True):
    """One stage's run for a task of an ensemble."""

    name: str
    model: str
    version: int
    task_id: Annotated[str, Meta(description="Id of the stage's own task.")]
    ms: Annotated[
        float,
        Meta(
            description="From when the stage could start until the ensemble had its result, in "
            "milliseconds."
        ),
    ]


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """Result of a task that succeeded, stored as the `result` of Celery's own format."""

    #: Explicit tensors by name. Raw JSON in the web tier, which only passes them on.
    outputs: dict[str, Any] | msgspec.Raw
    model: str
    version: int
    timings: Timings
    batch: BatchInfo
    #: `names.worker_label` of the worker.
    worker: str
    #: Whether it is the kept result of an earlier task.
    cached: bool = False
    #: Stages of an ensemble, in the order in which they ended; empty for other models.
    stages: tuple[StageRun, ...] = ()


class OutputTensor(TypedDict):
    """An explicit tensor; it has either `data` or `base64`."""

    dtype: Annotated[str, Meta(description="Such as `float32` or `string`.", examples=["float32"])]
    shape: Annotated[list[int], Meta(examples=[[1, 2]])]
    data: NotRequired[
        Annotated[
            Any,
            Meta(
                description="Nested lists. Each element of a `bytes` tensor is base64.",
                examples=[[[0.1, 0.9]]],
            ),
        ]
    ]
    base64: NotRequired[
        Annotated[
            str,
            Meta(description="Little-endian, row-major bytes of a numeric tensor."),
        ]
    ]


#: Only present in answers with a kept result.
Cached = Annotated[bool, Meta(description="Whether it is the kept result of an earlier task.")]


class Answer(TypedDict):
    """The answer to a synchronous call: a `Result`, and the task's id."""

    outputs: dict[str, OutputTensor]
    task_id: str
    model: Annotated[str, Meta(examples=["sentiment"])]
    version: Annotated[int, Meta(examples=[1])]
    timings: Timings
    batch: BatchInfo
    worker: Annotated[
        str,
        Meta(description="Label of the worker process; its log names it.", examples=["3f2a91c0"]),
    ]
    cached: NotRequired[Cached]
    stages: NotRequired[Annotated[list[StageRun], Meta(description="Stages of an ensemble.")]]


class Predictions(TypedDict):
    """The answer to a synchronous call with `instances` (KServe's V1)."""

    predictions: Annotated[
        list[Any],
        Meta(
            description="One item for each instance: the output, or an object of several outputs."
        ),
    ]
    model_name: str
    model_version: str
    task_id: str
