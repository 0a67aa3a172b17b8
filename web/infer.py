"""Submit and predict: the ways in."""

from __future__ import annotations

import msgspec
from flask import Blueprint, Response, request

from inferno.errors import DeadlineExceeded, ModelUnavailable
from inferno.protocol.requests import InferRequest, parse_predict, parse_submit
from inferno.protocol.tasks import TaskState
from tasks.records import Outcome
from tasks.submit import Accepted, new_task_id
from web import documents
from web.bridge import Waiter
from web.errors import problem
from web.preference import Preference, prefer
from web.services import services

blueprint = Blueprint("infer", __name__)

#: When a pending task is worth asking for, in seconds.
RETRY_AFTER_S = 1

#: How long after a deadline its worker may still say so, in seconds.
LATE_S = 0.1

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


@blueprint.post("/infer")
def infer() -> Response:
    """Accept a task and answer with its id, or with its result if the client prefers to wait."""
    here = services()
    # Clients send JSON without saying so; `get_json` would refuse them.
    body = request.get_data()
    wanted = parse_submit(body)
    preference = prefer(request.headers.get("Prefer"), 0.0)
    if not preference.wait_s:
        return _accepted(here.submit(wanted), body, preference)
    package, inputs = here.validate(wanted)
    task_id = new_task_id()
    with Waiter(here.bridge, task_id) as waiter:
        task = here.submitter.submit(wanted, package, inputs, task_id)
        outcome = waiter.wait(preference.wait_s)
    if outcome is None:
        return _accepted(task, body, preference)
    document = documents.task(task_id, *here.records.fetch(task_id))
    return _respond(document, 200, preference)


@blueprint.post("/models/<model>:predict")
def predict(model: str) -> Response:
    """Run a model and answer with its outputs; the call is a durable task like any other."""
    here = services()
    body = request.get_data()
    wanted = parse_predict(body, model)
    package, inputs = here.validate(wanted)
    if model not in here.loaded():
        raise ModelUnavailable(
            f"no live worker serves {model}; start one with: inferno worker {model}", "model"
        )
    default_s = here.settings.server.sync_wait_ms / 1000
    preference = prefer(request.headers.get("Prefer"), default_s)
    task_id = new_task_id()
    with Waiter(here.bridge, task_id) as waiter:
        task = here.submitter.submit(wanted, package, inputs, task_id)
        outcome = _wait(waiter, task, wanted, preference)
    if outcome is None:
        return _accepted(task, body, preference)
    return _finished(outcome, preference)


def _wait(
    waiter: Waiter, task: Accepted, wanted: InferRequest, preference: Preference
) -> Outcome | None:
    """Wait for as long as the caller wants to, or until the task's deadline has passed in its lane.

    A worker that holds the task says itself that it is too late; one that never comes cannot.
    """
    here = services()
    timeout_ms = wanted.timeout_ms or here.settings.tasks.timeout_ms
    if timeout_ms is None or timeout_ms / 1000 + LATE_S >= preference.wait_s:
        return waiter.wait(preference.wait_s)
    first_s = timeout_ms / 1000 + LATE_S
    outcome = waiter.wait(first_s)
    if outcome is None:
        record, _ = here.records.fetch(task.task_id)
        if record is not None and record.state is TaskState.QUEUED:
            late = DeadlineExceeded("the forward pass did not start in time", "timeout_ms")
            return Outcome(task.task_id, msgspec.Raw(b""), late)
        outcome = waiter.wait(preference.wait_s - first_s)
    return outcome


def _finished(outcome: Outcome, preference: Preference) -> Response:
    if outcome.error is not None:
        return problem(outcome.error, task_id=outcome.task_id)
    return _respond(documents.answer(outcome), 200, preference)


def _accepted(task: Accepted, body: bytes, preference: Preference) -> Response:
    response = _respond(documents.accepted(task, _members(body)), 202, preference)
    response.headers["Location"] = f"/tasks/{task.task_id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _respond(document: dict[str, object], status: int, preference: Preference) -> Response:
    response = Response(documents.encode(document), status, mimetype="application/json")
    if preference.applied is not None:
        response.headers["Preference-Applied"] = preference.applied
    return response
