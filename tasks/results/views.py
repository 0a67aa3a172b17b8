"""The JSON documents of tasks and dead letters, as clients and webhooks receive them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, NotRequired, TypedDict, cast, overload

import msgspec
from msgspec import Meta

from inferno.errors import (
    DeadlineExceeded,
    Problem,
    ResultExpired,
    StateUnreadable,
    TaskCancelled,
    TaskNotFound,
)
from inferno.protocol.tasks import Answer, BatchInfo, Cached, OutputTensor, TaskState, Timings
from tasks.state.dead import DeadLetter
from tasks.state.outcomes import Outcome
from tasks.state.records import Record

Time = Annotated[
    str,
    Meta(
        description="ISO 8601 in UTC.",
        examples=["2026-05-04T12:00:00.000+00:00"],
        extra_json_schema={"format": "date-time"},
    ),
]


class Links(TypedDict):
    """URLs of a task."""

    self: Annotated[str, Meta(examples=["/tasks/0d4c"])]
    websocket: Annotated[str, Meta(examples=["/ws/0d4c"])]


ModelName = Annotated[str, Meta(examples=["sentiment"])]
Version = Annotated[
    int | None,
    Meta(
        description="Null until a worker has chosen one, for tasks of other Celery clients.",
        examples=[1],
    ),
]
Priority = Annotated[int, Meta(description="Higher is sooner.", examples=[0])]
Attempts = Annotated[
    int, Meta(description="Forward passes that were started with the task in them.")
]
Retries = Annotated[int, Meta(description="Attempts after a transient error.")]
RetryAt = Annotated[Time, Meta(description="When the next attempt may begin, while `retrying`.")]
BatchId = Annotated[str, Meta(description="The batch that the task was in last.")]
ReplayOf = Annotated[str, Meta(description="The task that this one repeats.")]

Parent = Annotated[str, Meta(description="The task of the ensemble that this one is a stage of.")]


class TaskSummary(TypedDict):
    """A task in a list."""

    task_id: str
    model: ModelName
    version: Version
    status: TaskState
    attempts: Attempts
    retries: Retries
    priority: Priority
    accepted_at: Time
    started_at: Time | None
    finished_at: Time | None
    retry_at: NotRequired[RetryAt]
    batch_id: NotRequired[BatchId]
    replay_of: NotRequired[ReplayOf]
    parent: NotRequired[Parent]
    cached: NotRequired[Cached]
    links: Links


class StageView(TypedDict):
    """A stage of an ensemble's task."""

    name: str
    model: ModelName
    version: Version
    task_id: Annotated[str, Meta(description="Id of the stage's own task.")]
    status: NotRequired[Annotated[TaskState, Meta(description="Only while there is no result.")]]
    ms: NotRequired[
        Annotated[
            float, Meta(description="Time from when the stage could begin to its result, in ms.")
        ]
    ]


class TaskView(TypedDict):
    """A task; without a record, only its outcome is known."""

    task_id: str
    model: NotRequired[ModelName]
    version: NotRequired[Version]
    status: TaskState
    attempts: NotRequired[Attempts]
    retries: NotRequired[Retries]
    priority: NotRequired[Priority]
    accepted_at: NotRequired[Time]
    started_at: NotRequired[Time | None]
    finished_at: NotRequired[Time | None]
    retry_at: NotRequired[RetryAt]
    batch_id: NotRequired[BatchId]
    replay_of: NotRequired[ReplayOf]
    parent: NotRequired[Parent]
    outputs: NotRequired[
        Annotated[dict[str, OutputTensor], Meta(description="Only of a succeeded task.")]
    ]
    timings: NotRequired[Timings]
    batch: NotRequired[BatchInfo]
    worker: NotRequired[str]
    cached: NotRequired[Cached]
    stages: NotRequired[
        Annotated[list[StageView], Meta(description="Stages of an ensemble's task.")]
    ]
    error: NotRequired[Problem]
    links: Links


class DeadLetterLinks(TypedDict):
    """URLs of a dead letter and its task."""

    self: Annotated[str, Meta(examples=["/dead/0d4c"])]
    task: Annotated[str, Meta(examples=["/tasks/0d4c"])]


class LastError(TypedDict):
    """The error for which a task was given up."""

    code: Annotated[str, Meta(examples=["worker_lost"])]
    detail: str


class DeadLetterSummary(TypedDict):
    """A dead letter in a list."""

    task_id: str
    model: ModelName
    version: Version
    priority: Priority
    retries: Retries
    accepted_at: Time
    died_at: Annotated[Time, Meta(description="When the task was given up.")]
    batch_id: BatchId
    error: LastError
    links: DeadLetterLinks


class _Parts(msgspec.Struct):
    """A stored result; its parts are passed on without being decoded."""

    model: str
    version: int
    outputs: msgspec.Raw
    timings: msgspec.Raw
    batch: msgspec.Raw
    worker: msgspec.Raw
    cached: bool = False
    #: Stages of an ensemble; empty for other models.
    stages: msgspec.Raw = msgspec.Raw()


_decode_parts = msgspec.json.Decoder(_Parts).decode


def links(task_id: str) -> Links:
    """Return the URLs of a task."""
    return {"self": f"/tasks/{task_id}", "websocket": f"/ws/{task_id}"}


def _answer(outcome: Outcome) -> Answer:
    try:
        parts = _decode_parts(outcome.result)
    except msgspec.DecodeError as exc:
        raise StateUnreadable(f"the stored result cannot be read: {exc}") from None
    answer: Answer = {
        # Raw JSON, which the type does not express.
        "outputs": cast(Any, parts.outputs),
        "task_id": outcome.task_id,
        "model": parts.model,
        "version": parts.version,
        "timings": cast(Any, parts.timings),
        "batch": cast(Any, parts.batch),
        "worker": cast(Any, parts.worker),
    }
    if parts.cached:
        answer["cached"] = True
    if bytes(parts.stages):
        answer["stages"] = cast(Any, parts.stages)
    return answer


def task(task_id: str, record: Record | None, outcome: Outcome | None) -> TaskView:
    """Return the document of a task.

    Args:
      task_id: the task.
      record: its record, if there is one.
      outcome: its outcome, if there is one.
    Raises:
      TaskNotFound: there is neither a record nor an outcome.
      ResultExpired: the task is over, and its result was deleted.
    """
    if record is None and outcome is None:
        raise TaskNotFound(f"no task has the id {task_id!r}")
    if outcome is None:
        assert record is not None
        if record.state.terminal:
            raise ResultExpired(
                f"task {task_id} is over ({record.state}), and its result was deleted"
            )
    document: TaskView = {
        "task_id": task_id,
        "status": TaskState.SUCCEEDED,
        "links": links(task_id),
    }
    if record is not None:
        document.update(cast(TaskView, summary(record)))
    if outcome is None:
        return document
    if outcome.error is None:
        document.update(cast(TaskView, _answer(outcome)))
        document["status"] = TaskState.SUCCEEDED
    else:
        document["status"] = _failed_state(record, outcome)
        document["error"] = outcome.error.problem()
    return document


def summary(record: Record) -> TaskSummary:
    """Return a task as a list shows it."""
    document: TaskSummary = {
        "task_id": record.task_id,
        "model": record.model,
        "version": record.version,
        "status": record.state,
        "attempts": record.attempts,
        "retries": record.retries,
        "priority": record.priority,
        "accepted_at": time(record.accepted_at),
        "started_at": time(record.started_at),
        "finished_at": time(record.finished_at),
        "links": links(record.task_id),
    }
    if record.state is TaskState.RETRYING and record.retry_at is not None:
        document["retry_at"] = time(record.retry_at)
    if record.batch_id is not None:
        document["batch_id"] = record.batch_id
    if record.replay_of is not None:
        document["replay_of"] = record.replay_of
    if record.parent is not None:
        document["parent"] = record.parent
    if record.cached:
        document["cached"] = True
    return document


def dead_letter(letter: DeadLetter) -> DeadLetterSummary:
    """Return a dead letter as a list shows it."""
    return {
        "task_id": letter.task_id,
        "model": letter.model,
        "version": letter.version,
        "priority": letter.priority,
        "retries": letter.retries,
        "accepted_at": time(letter.accepted_at),
        "died_at": time(letter.died_at),
        "batch_id": letter.batch_id,
        "error": {"code": letter.code, "detail": letter.error},
        "links": {"self": f"/dead/{letter.task_id}", "task": f"/tasks/{letter.task_id}"},
    }


def _failed_state(record: Record | None, outcome: Outcome) -> TaskState:
    if record is not None and record.state.terminal:
        return record.state
    if isinstance(outcome.error, TaskCancelled):
        return TaskState.CANCELLED
    return TaskState.EXPIRED if isinstance(outcome.error, DeadlineExceeded) else TaskState.FAILED


@overload
def time(seconds: float) -> str: ...


@overload
def time(seconds: float | None) -> str | None: ...


def time(seconds: float | None) -> str | None:
    """Return seconds since the epoch as ISO 8601 in UTC, to the millisecond."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
