"""Submit and predict: the ways in (step submit of a task)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flask import Blueprint, Response, request

from inferno.errors import DeadlineExceeded, InvalidField, RequestInProgress
from inferno.protocol.requests import (
    BinaryPredictQuery,
    BinarySubmitQuery,
    Predict,
    Submit,
    is_binary,
    parse_binary,
    parse_predict,
    parse_submit,
)
from inferno.protocol.tasks import Answer as PredictAnswer
from inferno.protocol.tasks import Predictions
from inferno.repository.package import Package
from tasks.results.views import TaskView
from web.calls import idempotency, run
from web.calls.documents import ACCEPTED_HEADERS, AcceptedTask
from web.calls.preference import PREFERENCE_APPLIED
from web.openapi.describe import Success, describe
from web.routes.schemas import predict_schemas
from web.services import services

blueprint = Blueprint("infer", __name__)

#: Members of a body that is not JSON; a 202 then has no further names.
_NO_MEMBERS = b"{}"

_BINARY = ("application/octet-stream", "image/*", "audio/*")
_ACCEPTED = Success(AcceptedTask, "The task was accepted.", (*ACCEPTED_HEADERS, PREFERENCE_APPLIED))


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
        200: Success(
            TaskView,
            "The task is over; only with `Prefer: wait`.",
            (PREFERENCE_APPLIED,),
        ),
        202: _ACCEPTED,
    },
    errors=run.REFUSALS,
    body=Submit,
    binary=_BINARY,
    query=(BinarySubmitQuery,),
    headers=run.HEADERS,
    always=(idempotency.REPLAYED,),
    examples=_samples,
)
def infer() -> Response:
    """Accept a task and answer with its id, or with its result if the client prefers to wait."""
    gateway = services().gateway
    # `get_json` would refuse JSON without its content type, which many clients leave out.
    body = request.get_data()
    if is_binary(request.content_type):
        inference = parse_binary(body, request.args.to_dict())
        family, members = _binary_family("infer"), _NO_MEMBERS
    else:
        _refuse_parameters(BinarySubmitQuery)
        inference = parse_submit(body, gateway.limits)
        family, members = "infer", body
    call = run.read(inference, family, body, default_wait_s=0.0)
    return run.answer_submit(gateway, call, run.submit(gateway, call), members)


@blueprint.post("/models/<model>:predict")
@describe(
    {
        200: Success((PredictAnswer, Predictions), "The outputs.", (PREFERENCE_APPLIED,)),
        202: _ACCEPTED,
    },
    errors=(*run.REFUSALS, RequestInProgress, *run.FAILURES, DeadlineExceeded),
    body=Predict,
    binary=_BINARY,
    query=(BinaryPredictQuery,),
    headers=run.HEADERS,
    always=(idempotency.REPLAYED,),
    prefix="/v1",
    of_model=predict_schemas,
)
def predict(model: str) -> Response:
    """Run a model and answer with its outputs; the call is a durable task like any other."""
    here = services()
    body = request.get_data()
    if is_binary(request.content_type):
        inference = parse_binary(body, request.args.to_dict(), model)
        family, members = _binary_family(f"predict {model}"), _NO_MEMBERS
    else:
        _refuse_parameters(BinaryPredictQuery)
        inference = parse_predict(body, model, here.gateway.limits)
        family, members = f"predict {model}", body
    call = run.read(inference, family, body, here.settings.server.sync_wait_ms / 1000)
    return run.answer_predict(here.gateway, call, run.predict(here.gateway, call), members)


def _refuse_parameters(kind: type[BinaryPredictQuery]) -> None:
    """Refuse URL parameters that belong into a JSON body, rather than ignore them.

    Raises:
      InvalidField: such a parameter was given; names it.
    """
    for name in kind.__struct_fields__:
        if name in request.args:
            raise InvalidField(f"expected {name} in the JSON body, not in the URL", name)


def _binary_family(kind: str) -> str:
    """Return the family of a binary request: its query is a part of what it asks for."""
    return f"{kind} {request.content_type} {request.query_string.decode(errors='replace')}"
