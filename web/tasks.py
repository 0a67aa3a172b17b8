"""Tasks by their id, for those who poll."""

from __future__ import annotations

from flask import Blueprint, Response, request

from web import documents
from web.infer import RETRY_AFTER_S
from web.preference import wait_parameter
from web.services import services

blueprint = Blueprint("tasks", __name__)


@blueprint.get("/tasks/<task_id>")
@blueprint.get("/result/<task_id>")
def show(task_id: str) -> Response:
    """Answer with everything that is known of a task; `?wait=<seconds>` waits for its end."""
    here = services()
    wait_s = wait_parameter(request.args.get("wait"))
    record, outcome = here.fetch(task_id, wait_s)
    response = Response(
        documents.encode(documents.task(task_id, record, outcome)), mimetype="application/json"
    )
    if outcome is None:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response
