"""The JSON documents about tasks that clients receive, over HTTP and WebSockets."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from flask import Response
from msgspec import Meta

from inferno.protocol.tasks import Cached, Predictions, TaskState
from tasks.intake.submit import Accepted
from tasks.results.views import (
    Links,
    ModelName,
    ReplayOf,
    Time,
    Version,
    dead_letter,
    links,
    summary,
    task,
    time,
)
from tasks.state.outcomes import Outcome
from web.openapi.describe import RETRY_AFTER, Header

__all__ = [
    "accepted",
    "dead_letter",
    "encode",
    "predictions",
    "respond",
    "respond_accepted",
    "succeeded",
    "summary",
    "task",
]

#: When to ask for a task that is not over, in seconds.
POLL_AFTER_S = 1

#: Headers of the answer to an accepted task.
ACCEPTED_HEADERS = (Header("Location", "URL of the task.", example="/tasks/0d4c"), RETRY_AFTER)


class _Tensor(msgspec.Struct):
    data: Any


class _Rows(msgspec.Struct):
    """The members of a stored result that an answer by rows needs."""

    model: str
    version: int
    outputs: dict[str, _Tensor]


class AcceptedTask(TypedDict):
    """A task that was just accepted."""

    task_id: str
    status: Annotated[
        TaskState,
        Meta(description="`succeeded` if a kept result answered the task, otherwise `queued`."),
    ]
    model: ModelName
    version: Version
    accepted_at: Time
    links: Links
    cached: NotRequired[Cached]
    replay_of: NotRequired[ReplayOf]
    job_id: NotRequired[Annotated[str, Meta(description="Only for bodies with `model_name`.")]]
    model_name: NotRequired[Annotated[str, Meta(description="Only for bodies with `model_name`.")]]
    enqueued_at: NotRequired[
        Annotated[Time, Meta(description="Only for bodies with `model_name`.")]
    ]
    result_ws: NotRequired[Annotated[str, Meta(description="Only for bodies with `model_name`.")]]
    request_id: NotRequired[Annotated[str, Meta(description="Only for bodies with `model_id`.")]]


_encode = msgspec.json.Encoder().encode
_decode_rows = msgspec.json.Decoder(_Rows).decode


def encode(document: Any) -> bytes:
    """Write a document as JSON; a newline at the end suits terminals."""
    return _encode(document) + b"\n"


def respond(document: Mapping[str, Any], status: int = 200) -> Response:
    """Answer with a document."""
    return Response(encode(document), status, mimetype="application/json")


def respond_accepted(
    task: Accepted, members: Container[str] = (), replay_of: str | None = None
) -> Response:
    """Answer with 202 and a task that was just accepted.

    Args:
      task: the task.
      members: names in the client's body; as `accepted`.
      replay_of: id of the task that this one repeats.
    """
    document = accepted(task, members)
    if replay_of is not None:
        document["replay_of"] = replay_of
    response = respond(document, 202)
    response.headers["Location"] = f"/tasks/{task.task_id}"
    response.headers["Retry-After"] = str(POLL_AFTER_S)
    return response


def succeeded(outcome: Outcome) -> bytes:
    """Write the document of a synchronous call that succeeded.

    It is the stored result as it is, with the task's id added.
    """
    return b'%b,"task_id":"%b"}\n' % (bytes(outcome.result)[:-1], outcome.task_id.encode())


def predictions(outcome: Outcome) -> Predictions:
    """Return the document of a synchronous call that is answered by rows, as in KServe's V1.

    A row is a value if the model has one output, otherwise an object with a value per output.
    """
    result = _decode_rows(outcome.result)
    columns = {name: tensor.data for name, tensor in result.outputs.items()}
    if len(columns) == 1:
        (rows,) = columns.values()
    else:
        lists = [rows if isinstance(rows, list) else [rows] for rows in columns.values()]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
    return {
        "predictions": rows,
        "model_name": result.model,
        "model_version": str(result.version),
        "task_id": outcome.task_id,
    }


def accepted(task: Accepted, members: Container[str]) -> AcceptedTask:
    """Return the document of a task that was just accepted.

    Args:
      task: the task.
      members: names in the client's body; the document repeats facts under the names that go
        with `model_name` and `model_id`.
    """
    at = time(task.accepted_at)
    document: AcceptedTask = {
        "task_id": task.task_id,
        "status": TaskState.QUEUED if task.outcome is None else TaskState.SUCCEEDED,
        "model": task.model,
        "version": task.version,
        "accepted_at": at,
        "links": links(task.task_id),
    }
    if task.outcome is not None:
        document["cached"] = True
    if "model_name" in members:
        document["job_id"] = task.task_id
        document["model_name"] = task.model
        document["enqueued_at"] = at
        document["result_ws"] = f"/api/v1/ws/{task.task_id}"
    if "model_id" in members:
        document["request_id"] = task.task_id
    return document
