"""Tasks by id: poll, list, cancel, retry."""

from __future__ import annotations

from typing import Annotated, TypedDict

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from inferno import names
from inferno.errors import (
    BrokerUnavailable,
    FateUnknown,
    InvalidRequest,
    ModelNotFound,
    PayloadGone,
    ResultExpired,
    TaskNotFound,
    WrongState,
)
from inferno.protocol.tasks import TaskState
from tasks.results.views import TaskSummary, TaskView
from tasks.state.records import Record
from web.calls import documents, paging
from web.calls.documents import ACCEPTED_HEADERS, AcceptedTask
from web.calls.parameters import read
from web.calls.preference import Wait, granted_s
from web.openapi.describe import RETRY_AFTER, Success, describe
from web.services import Services, services

blueprint = Blueprint("tasks", __name__)


class TasksQuery(paging.Paged):
    """Parameters of the list of tasks."""

    status: Annotated[
        list[TaskState], Meta(description="Only tasks in these states; all by default.")
    ] = msgspec.field(default_factory=list)


class TaskList(TypedDict):
    """Tasks, newest first."""

    tasks: list[TaskSummary]
    next: paging.Next


#: The answer to a retry or a replay.
REPEATED = Success(AcceptedTask, "A new task was accepted.", ACCEPTED_HEADERS)


@blueprint.get("/tasks/<task_id>")
@blueprint.get("/result/<task_id>")
@describe(
    {200: Success(TaskView, "The task.", (RETRY_AFTER,))},
    errors=(InvalidRequest, TaskNotFound, ResultExpired, BrokerUnavailable),
    query=(Wait,),
)
def show(task_id: str) -> Response:
    """Show everything that is known of a task, at once or when it is over."""
    here = services()
    record, outcome = here.gateway.fetch(task_id, granted_s(read(Wait).wait))
    document = documents.task(task_id, record, outcome)
    if record is not None and "stages" not in document:
        _add_stages(document, here, record)
    response = documents.respond(document)
    if outcome is None:
        response.headers["Retry-After"] = str(documents.POLL_AFTER_S)
    return response


def _add_stages(document: TaskView, here: Services, record: Record) -> None:
    """Add the stages that have begun to the task of an ensemble without a result."""
    model = here.repository.models.get(record.model)
    package = None if model is None else model.versions.get(record.version or 0)
    if package is None or not package.is_ensemble:
        return
    stages = package.manifest.ensemble
    task_ids = [names.stage_task_id(record.task_id, stage.name) for stage in stages]
    document["stages"] = [
        {
            "name": stage.name,
            "model": stage.model,
            "task_id": begun.task_id,
            "version": begun.version,
            "status": begun.state,
        }
        for stage, begun in zip(stages, here.records.records(task_ids), strict=True)
        if begun is not None
    ]


@blueprint.get("/tasks")
@describe({200: TaskList}, errors=(InvalidRequest, BrokerUnavailable), query=(TasksQuery,))
def index() -> Response:
    """List the newest tasks, of all states and models or only of some."""
    query = read(TasksQuery)

    def matches(record: Record) -> bool:
        in_state = not query.status or record.state in query.status
        return in_state and query.model in (None, record.model)

    page = services().records.newest(query.limit, matches, paging.place(query.cursor))
    tasks = [documents.summary(record) for record in page.items]
    return documents.respond({"tasks": tasks, "next": paging.cursor(page)})


@blueprint.delete("/tasks/<task_id>")
@describe({200: TaskView}, errors=(TaskNotFound, WrongState, ResultExpired, BrokerUnavailable))
def cancel(task_id: str) -> Response:
    """Cancel a task; the result of a running task is discarded."""
    here = services()
    here.control.cancel(task_id)
    return documents.respond(documents.task(task_id, *here.records.fetch(task_id)))


@blueprint.post("/tasks/<task_id>/retry")
@describe(
    {202: REPEATED},
    errors=(
        TaskNotFound,
        ModelNotFound,
        WrongState,
        PayloadGone,
        BrokerUnavailable,
        FateUnknown,
    ),
)
def retry(task_id: str) -> Response:
    """Run a finished task again, as a new task."""
    here = services()
    record, _ = here.records.fetch(task_id)
    if record is not None:
        # Without its model, the new task would wait for ever.
        here.repository.model(record.model)
    return documents.respond_accepted(here.replay.retry(task_id), replay_of=task_id)
