"""The life of a task: its states, and what is known of it when it is over."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from msgspec import Meta


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

    queue_ms: Annotated[float, Meta(description="From acceptance until a worker held it.")]
    batch_wait_ms: Annotated[float, Meta(description="From there until its forward pass started.")]
    inference_ms: Annotated[
        float,
        Meta(
            description="The forward pass, with splitting its batch, and preparing it where it did "
            "not wait for another pass meanwhile."
        ),
    ]
    total_ms: Annotated[float, Meta(description="From acceptance until its outcome was settled.")]


class BatchInfo(msgspec.Struct, frozen=True):
    """The batch that a task rode in."""

    id: str
    size: Annotated[int, Meta(description="Tasks in it.")]
    rows: Annotated[int, Meta(description="Rows in it: a task may have several.")]
    flush_reason: Annotated[
        str,
        Meta(description="Why it left: `full`, `window`, `idle`, `deadline` or `isolated`."),
    ]
    predicted_ms: Annotated[
        float,
        Meta(description="What the pass was expected to take; 0 before anything was measured."),
    ]
    run_ms: Annotated[float, Meta(description="What it took, in milliseconds.")]


class StageRun(msgspec.Struct, frozen=True):
    """What an ensemble had from one of its stages."""

    name: str
    model: str
    version: int
    task_id: Annotated[str, Meta(description="Of the stage's own task.")]
    ms: Annotated[
        float,
        Meta(description="From when the stage could begin until the ensemble had its result."),
    ]


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


class OutputTensor(TypedDict):
    """An explicit tensor; it has either `data` or `base64`."""

    dtype: Annotated[str, Meta(description="Such as `float32`, `string`.", examples=["float32"])]
    shape: Annotated[list[int], Meta(examples=[[1, 2]])]
    data: NotRequired[
        Annotated[
            Any,
            Meta(
                description="Nested lists; an element of a `bytes` tensor is base64.",
                examples=[[[0.1, 0.9]]],
            ),
        ]
    ]
    base64: NotRequired[
        Annotated[
            str,
            Meta(description="The little-endian, row-major bytes of a numeric tensor."),
        ]
    ]


#: Marks what was answered with a kept result; other documents do not have it.
Cached = Annotated[bool, Meta(description="Whether it is the kept result of an earlier task.")]


class Answer(TypedDict):
    """The answer to a synchronous call: a `Result`, and the task's id."""

    outputs: dict[str, OutputTensor]
    task_id: str
    model: Annotated[str, Meta(examples=["sentiment"])]
    version: Annotated[int, Meta(examples=[1])]
    timings: Timings
    batch: BatchInfo
    worker: Annotated[str, Meta(examples=["sentiment-4711@host"])]
    cached: NotRequired[Cached]
    stages: NotRequired[Annotated[list[StageRun], Meta(description="Of an ensemble.")]]


class Predictions(TypedDict):
    """The answer to a synchronous call with `instances`: KServe's V1."""

    predictions: Annotated[
        list[Any],
        Meta(description="One for each instance; of several outputs, an object of them."),
    ]
    model_name: str
    model_version: str
    task_id: str
