"""Tasks by their id, for those who poll, and what else may be done to them."""

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
from tasks.intake.submit import Accepted
from tasks.results.views import TaskSummary, TaskView
from tasks.state.records import Record
from web.calls import documents, paging
from web.calls.documents import AcceptedTask
from web.calls.parameters import read
from web.calls.preference import Wait, granted_s
from web.openapi.document import RETRY_AFTER, Answer, describe
from web.routes.infer import LOCATION, RETRY_AFTER_S
from web.services import Services, services

blueprint = Blueprint("tasks", __name__)


class TasksQuery(paging.Paged):
    """The parameters of the list of tasks."""

    status: Annotated[
        list[TaskState], Meta(description="Only of these states; by default, of all.")
    ] = msgspec.field(default_factory=list)


class TaskList(TypedDict):
    """Tasks, newest first."""

    tasks: list[TaskSummary]
    next: paging.Next


#: The answer to whoever has a task repeated.
REPEATED = Answer(AcceptedTask, "A new task was accepted.", (LOCATION, RETRY_AFTER))


@blueprint.get("/tasks/<task_id>")
@blueprint.get("/result/<task_id>")
@describe(
    {200: Answer(TaskView, "What is known of it.", (RETRY_AFTER,))},
    errors=(InvalidRequest, TaskNotFound, ResultExpired, BrokerUnavailable),
    query=(Wait,),
)
def show(task_id: str) -> Response:
    """Answer with everything that is known of a task, at once or at its end."""
    here = services()
    record, outcome = here.fetch(task_id, granted_s(read(Wait).wait))
    document = documents.task(task_id, record, outcome)
    if record is not None and "stages" not in document:
        _add_stages(document, here, record)
    response = documents.respond(document)
    if outcome is None:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _add_stages(document: TaskView, here: Services, record: Record) -> None:
    """Say of an ensemble's task without a result how far its stages have come."""
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
    """List the newest tasks, those of some states or of one model if so asked."""
    query = read(TasksQuery)

    def wanted(record: Record) -> bool:
        right = not query.status or record.state in query.status
        return right and query.model in (None, record.model)

    page = services().records.newest(query.limit, wanted, paging.place(query.cursor))
    tasks = [documents.summary(record) for record in page.items]
    return documents.respond({"tasks": tasks, "next": paging.cursor(page)})


@blueprint.delete("/tasks/<task_id>")
@describe({200: TaskView}, errors=(TaskNotFound, WrongState, ResultExpired, BrokerUnavailable))
def cancel(task_id: str) -> Response:
    """Take a task back; if it runs, its result is discarded."""
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
    """Run again, as a new task, what a finished one was asked."""
    here = services()
    record, _ = here.records.fetch(task_id)
    if record is not None:
        # Without its model, the new task would wait for ever.
        here.repository.model(record.model)
    return repeated(here.control.retry(task_id), task_id)


def repeated(task: Accepted, replay_of: str) -> Response:
    """Answer as to a submit, with the task that is repeated."""
    document = documents.accepted(task, ())
    document["replay_of"] = replay_of
    response = documents.respond(document, 202)
    response.headers["Location"] = f"/tasks/{task.task_id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response
