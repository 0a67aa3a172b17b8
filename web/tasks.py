"""Tasks by their id, for those who poll, and what else may be done to them."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from inferno import names
from inferno.errors import InvalidRequest
from inferno.protocol.tasks import TaskState
from tasks.records import Record
from tasks.submit import Accepted
from web import documents, paging
from web.infer import RETRY_AFTER_S
from web.preference import wait_parameter
from web.services import Services, services

blueprint = Blueprint("tasks", __name__)


@blueprint.get("/tasks/<task_id>")
@blueprint.get("/result/<task_id>")
def show(task_id: str) -> Response:
    """Answer with everything that is known of a task; `?wait=<seconds>` waits for its end."""
    here = services()
    wait_s = wait_parameter(request.args.get("wait"))
    record, outcome = here.fetch(task_id, wait_s)
    document = documents.task(task_id, record, outcome)
    if record is not None and "stages" not in document:
        document |= _stages(here, record)
    response = documents.respond(document)
    if outcome is None:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _stages(here: Services, record: Record) -> dict[str, Any]:
    """Say of an ensemble's task without a result how far its stages have come."""
    model = here.repository.models.get(record.model)
    package = None if model is None else model.versions.get(record.version or 0)
    if package is None or not package.is_ensemble:
        return {}
    stages = package.manifest.ensemble
    task_ids = [names.stage_task_id(record.task_id, stage.name) for stage in stages]
    return {
        "stages": [
            {"name": stage.name, "model": stage.model, "task_id": begun.task_id}
            | {"version": begun.version, "status": begun.state}
            for stage, begun in zip(stages, here.records.records(task_ids), strict=True)
            if begun is not None
        ]
    }


@blueprint.get("/tasks")
def index() -> Response:
    """List the newest tasks, those of some states or of one model if so asked."""
    states, model = _states(), request.args.get("model")

    def wanted(record: Record) -> bool:
        return (not states or record.state in states) and model in (None, record.model)

    page = services().records.newest(paging.limit(), wanted, paging.place())
    tasks = [documents.summary(record) for record in page.items]
    return documents.respond({"tasks": tasks, "next": paging.cursor(page)})


@blueprint.delete("/tasks/<task_id>")
def cancel(task_id: str) -> Response:
    """Take a task back; if it runs, its result is discarded."""
    here = services()
    here.control.cancel(task_id)
    return documents.respond(documents.task(task_id, *here.records.fetch(task_id)))


@blueprint.post("/tasks/<task_id>/retry")
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
    document = documents.accepted(task, ()) | {"replay_of": replay_of}
    response = documents.respond(document, 202)
    response.headers["Location"] = f"/tasks/{task.task_id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _states() -> set[TaskState]:
    """Read `status`, which may be repeated or hold several, separated by commas."""
    given = [name for part in request.args.getlist("status") for name in part.split(",")]
    try:
        return {TaskState(name) for name in given}
    except ValueError as exc:
        known = ", ".join(TaskState)
        raise InvalidRequest(f"expected some of {known}: {exc}", "status") from None
