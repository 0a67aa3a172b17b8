"""Submit and predict: the ways in."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any

import msgspec
from flask import Blueprint, Response, request
from msgspec import Meta

from inferno.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    FateUnknown,
    ForwardFailed,
    InputsLost,
    InvalidField,
    InvalidInput,
    InvalidRequest,
    KeyReused,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    RequestInProgress,
    ResultExpired,
    TaskCancelled,
    WorkerLost,
)
from inferno.protocol.requests import (
    BinaryPredictQuery,
    BinarySubmitQuery,
    InferRequest,
    Predict,
    Submit,
    is_binary,
    parse_binary,
    parse_predict,
    parse_submit,
)
from inferno.protocol.tasks import Answer as Answered
from inferno.protocol.tasks import Predictions
from inferno.repository.package import Package
from tasks.intake.submit import Accepted, new_task_id
from tasks.results.bridge import Waiter
from tasks.results.views import TaskView
from tasks.state.outcomes import Outcome
from tasks.state.transitions import Idempotency
from web.calls import disconnect, documents, idempotency
from web.calls.documents import AcceptedTask
from web.calls.errors import problem
from web.calls.preference import PREFER, PREFERENCE_APPLIED, Preference, prefer
from web.openapi.document import RETRY_AFTER, Answer, Header, describe
from web.routes.schemas import predict_schemas
from web.services import Services, services

blueprint = Blueprint("infer", __name__)

#: When a pending task is worth asking for, in seconds.
RETRY_AFTER_S = 1
#: The status of a request whose client has left, as nginx has it; nobody receives it.
CLIENT_CLOSED_REQUEST = 499

#: In place of a body that is no JSON: its client has spoken in no other names.
_NO_MEMBERS = b"{}"

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


LOCATION = Header("Location", "Where to ask for the task.", example="/tasks/0d4c")

_BINARY = ("application/octet-stream", "image/*", "audio/*")
#: Of a request that runs a model.
HEADERS = (
    idempotency.KEY,
    PREFER,
    Header("Cache-Control", "`no-cache`: the task is computed for itself.", example="no-cache"),
    Header(
        "Inferno-Version",
        "Which version answers.",
        Annotated[int, Meta(ge=1, le=999_999_999)],
        example=1,
    ),
    Header(
        "Inferno-Sticky-Key",
        "Requests with the same key are answered by the same version.",
        example="user-7",
    ),
)
_ACCEPTED = Answer(
    AcceptedTask,
    "The task was accepted.",
    (LOCATION, RETRY_AFTER, PREFERENCE_APPLIED),
)
#: What keeps a task from being accepted.
_REFUSALS = (
    InvalidRequest,
    ModelNotFound,
    ResultExpired,
    InvalidField,
    InvalidInput,
    KeyReused,
    Overloaded,
    BrokerUnavailable,
    FateUnknown,
)


def _samples(models: Iterable[Package]) -> dict[str, Any]:
    """Return a body to submit for each model that has a sample."""
    return {
        package.name: {"model": package.name, "inputs": package.manifest.warm_up.inputs}
        for package in models
        if package.manifest.warm_up.inputs
    }


@blueprint.post("/infer")
@describe(
    {
        200: Answer(
            TaskView,
            "The task is over; with `Prefer: wait`.",
            (PREFERENCE_APPLIED,),
        ),
        202: _ACCEPTED,
    },
    errors=_REFUSALS,
    body=Submit,
    binary=_BINARY,
    query=(BinarySubmitQuery,),
    headers=HEADERS,
    always=(idempotency.REPLAYED,),
    examples=_samples,
)
def infer() -> Response:
    """Accept a task and answer with its id, or with its result if the client prefers to wait."""
    here = services()
    # Clients send JSON without saying so; `get_json` would refuse them.
    body = request.get_data()
    if is_binary(request.content_type):
        wanted = parse_binary(body, request.args.to_dict())
        key = idempotency.from_header(_scope("infer"), body)
        body = _NO_MEMBERS
    else:
        _refuse_parameters(BinarySubmitQuery)
        wanted = parse_submit(body)
        key = idempotency.from_header("infer", body)
    wanted = as_headers_say(wanted, request.environ)
    preference = prefer(request.headers.get("Prefer"), 0.0)
    if not preference.wait_s:
        return _accepted(here.submit(wanted, key), body, preference)
    valid = here.validate(wanted)
    task_id = new_task_id()
    with Waiter(here.bridge, task_id, expected=True) as waiter:
        task = here.publish(valid, task_id, key)
        outcome = None
        if not task.replayed:
            sock = disconnect.socket_of(request.environ)
            outcome = _wait(here, waiter, task, wanted, preference, key, sock)
    if outcome is not None or task.replayed:
        # An earlier task may be over for long, or have to be waited for.
        record, outcome = here.fetch(task.task_id, preference.wait_s if task.replayed else 0.0)
        document = documents.task(task.task_id, record, outcome)
        if outcome is not None:
            return _respond(documents.encode(document), 200, preference, task.replayed)
    return _accepted(task, body, preference)


@blueprint.post("/models/<model>:predict")
@describe(
    {
        200: Answer((Answered, Predictions), "The outputs.", (PREFERENCE_APPLIED,)),
        202: _ACCEPTED,
    },
    errors=(
        *_REFUSALS,
        RequestInProgress,
        TaskCancelled,
        ForwardFailed,
        WorkerLost,
        InputsLost,
        ModelUnavailable,
        DeadlineExceeded,
    ),
    body=Predict,
    binary=_BINARY,
    query=(BinaryPredictQuery,),
    headers=HEADERS,
    always=(idempotency.REPLAYED,),
    prefix="/v1",
    of_model=predict_schemas,
)
def predict(model: str) -> Response:
    """Run a model and answer with its outputs; the call is a durable task like any other."""
    here = services()
    body = request.get_data()
    if is_binary(request.content_type):
        wanted = parse_binary(body, request.args.to_dict(), model)
        key = idempotency.from_header(_scope(f"predict {model}"), body)
        body = _NO_MEMBERS
    else:
        _refuse_parameters(BinaryPredictQuery)
        wanted = parse_predict(body, model)
        key = idempotency.from_header(f"predict {model}", body)
    wanted = as_headers_say(wanted, request.environ)
    preference = prefer(request.headers.get("Prefer"), here.settings.server.sync_wait_ms / 1000)
    ran = run(here, wanted, preference, key, disconnect.socket_of(request.environ))
    return predicted(ran, wanted, body, preference)


def _refuse_parameters(kind: type[BinaryPredictQuery]) -> None:
    """Refuse what a JSON body says itself, rather than ignore it in the URL.

    Raises:
      InvalidField: names the parameter.
    """
    for name in kind.__struct_fields__:
        if name in request.args:
            raise InvalidField(f"expected {name} in the JSON body, not in the URL", name)


def _scope(kind: str) -> str:
    """Return the kind of a request whose query is a part of what it asks for."""
    return f"{kind} {request.content_type} {request.query_string.decode(errors='replace')}"


def run(
    here: Services,
    wanted: InferRequest,
    preference: Preference,
    key: Idempotency | None,
    sock: socket.socket | None,
) -> tuple[Accepted, Outcome | None]:
    """Submit what a predict asks for, and wait for as long as its caller wants to.

    Args:
      here: of the app.
      wanted: what it asks for.
      preference: how long the caller waits.
      key: of the request, if it has one.
      sock: the caller's connection, if it can be known.
    Returns:
      the task, and its outcome if it has come and the task is a new one.
    Raises:
      RequestError: the request is wrong.
      ServingError: the task was not accepted.
      Disconnected: the caller has hung up, and the settings say that this matters.
    """
    valid = here.validate(wanted)
    model = here.unserved(valid.package)
    if model is not None and not (key and here.submitter.earlier(key)):
        raise ModelUnavailable(
            f"no live worker serves {model}; start one with: inferno worker {model}", "model"
        )
    task_id = new_task_id()
    with Waiter(here.bridge, task_id, expected=True) as waiter:
        task = here.publish(valid, task_id, key)
        if task.replayed:
            return task, None
        return task, _wait(here, waiter, task, wanted, preference, key, sock)


def predicted(
    ran: tuple[Accepted, Outcome | None],
    wanted: InferRequest,
    body: bytes,
    preference: Preference,
) -> Response:
    """Answer a predict that has run, or still does."""
    task, outcome = ran
    if task.replayed:
        record, outcome = services().fetch(task.task_id)
        documents.task(task.task_id, record, outcome)  # Raises if its result is gone.
        if outcome is None and preference.wait_s:
            running = RequestInProgress("the first request with this Idempotency-Key still runs")
            return problem(running, task_id=task.task_id)
    if outcome is None:
        return _accepted(task, body, preference)
    if outcome.error is not None:
        return marked(problem(outcome.error, task_id=outcome.task_id), None, task.replayed)
    document = documents.succeeded(outcome)
    if wanted.by_instance:
        document = documents.encode(documents.predictions(outcome))
    return _respond(document, 200, preference, task.replayed)


@blueprint.errorhandler(disconnect.Disconnected)
def hung_up(exc: disconnect.Disconnected) -> Response:
    """End the task of a caller who has hung up, unless somebody else waits for it."""
    here = services()
    try:
        disconnect.cancel_unwanted(exc.task_id, here.client, here.control)
    except BrokerUnavailable as error:
        return problem(error)
    return Response(status=CLIENT_CLOSED_REQUEST)


def as_headers_say(wanted: InferRequest, environ: Mapping[str, Any]) -> InferRequest:
    """Add to a request what its headers ask for.

    `Cache-Control`: let it be computed for itself. `Inferno-Version`: of the model.
    `Inferno-Sticky-Key`: give the same version to all that have the same key.

    Raises:
      InvalidRequest: the version is no number, or the body names another one.
    """
    said = environ.get("HTTP_CACHE_CONTROL", "").lower()
    if "no-cache" in said or "no-store" in said:
        wanted = msgspec.structs.replace(wanted, cache=False)
    if (version := environ.get("HTTP_INFERNO_VERSION")) is not None:
        if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
            raise InvalidRequest(f"Inferno-Version: expected a number, got {version!r:.80}")
        if wanted.version not in (None, int(version)):
            raise InvalidRequest(
                f"Inferno-Version: the body names version {wanted.version}; name one of them"
            )
        wanted = msgspec.structs.replace(wanted, version=int(version))
    if sticky := environ.get("HTTP_INFERNO_STICKY_KEY"):
        wanted = msgspec.structs.replace(wanted, sticky=sticky)
    return wanted


def _wait(
    here: Services,
    waiter: Waiter,
    task: Accepted,
    wanted: InferRequest,
    preference: Preference,
    key: Idempotency | None,
    sock: socket.socket | None,
) -> Outcome | None:
    """Wait for as long as the caller wants to.

    Raises:
      Disconnected: the caller has hung up, and the settings say that this matters.
    """
    if task.outcome is not None:
        return task.outcome
    here.deadlines.watch(task.task_id, task.deadline)
    # Who gave a key may come back with it, and a webhook is somebody else who waits.
    wanted_anyway = key is not None or wanted.webhook is not None
    if wanted_anyway or not here.settings.tasks.cancel_on_disconnect:
        outcome = waiter.wait(preference.wait_s)
    else:
        outcome = disconnect.wait(waiter, task.task_id, preference.wait_s, sock)
    if outcome is None:
        # Where Celery itself has ended the task, this process is not told.
        with suppress(BrokerUnavailable):
            return here.records.outcomes([task.task_id]).get(task.task_id)
    return outcome


def _accepted(task: Accepted, body: bytes, preference: Preference) -> Response:
    document = documents.encode(documents.accepted(task, _members(body)))
    response = _respond(document, 202, preference, task.replayed)
    response.headers["Location"] = f"/tasks/{task.task_id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _respond(body: bytes, status: int, preference: Preference, replayed: bool) -> Response:
    return marked(Response(body, status, mimetype="application/json"), preference, replayed)


def marked(response: Response, preference: Preference | None, replayed: bool) -> Response:
    """Say in an answer which preference was granted, and whether it is that of an earlier call."""
    if preference is not None and preference.applied is not None:
        response.headers["Preference-Applied"] = preference.applied
    if replayed:
        response.headers[idempotency.REPLAYED_HEADER] = "true"
    return response
