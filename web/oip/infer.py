"""Inference in the Open Inference Protocol, version 2, with Triton's extensions.

The requests become the same `InferRequest` as those of `:predict`, and run as they do.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from flask import Blueprint, Response, after_this_request, request
from msgspec import Meta

from inferno.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    FateUnknown,
    InvalidField,
    InvalidInput,
    InvalidRequest,
    KeyReused,
    ModelNotFound,
    NotInTime,
    Overloaded,
    ResultExpired,
)
from inferno.protocol import oip
from inferno.protocol.decoding import decode
from inferno.protocol.requests import InferRequest
from tasks.intake.submit import Accepted
from web.calls import documents, idempotency, run
from web.calls.preference import PREFERENCE_APPLIED
from web.oip import compression
from web.oip.describe import ERRORS
from web.oip.models import find, version_number
from web.openapi.describe import Header, Success, describe
from web.services import services

blueprint = Blueprint("oip-infer", __name__, url_prefix="/v2")


class OutputOfRequest(TypedDict):
    """One output."""

    name: str
    datatype: Annotated[str, Meta(examples=["FP32"])]
    shape: list[int]
    data: NotRequired[Annotated[list[Any], Meta(description="Flat; absent if it is binary.")]]
    parameters: NotRequired[dict[str, Any]]


class InferenceAnswer(TypedDict):
    """The outputs of an inference."""

    model_name: str
    model_version: str
    id: NotRequired[Annotated[str, Meta(description="The id that the client gave.")]]
    outputs: list[OutputOfRequest]
    parameters: NotRequired[dict[str, Any]]


class Generated(TypedDict):
    """A generated text."""

    model_name: str
    model_version: str
    text_output: str
    id: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


_LENGTH = Header(
    oip.HEADER_LENGTH, "Size of the JSON part of the body, in bytes; binary tensors follow it."
)
_ENCODING = Header("Content-Encoding", "`gzip` or `deflate`.")
_CALL_HEADERS = (*run.HEADERS, _LENGTH, _ENCODING)
_CALL_ALWAYS = (idempotency.REPLAYED, PREFERENCE_APPLIED)
_CALL_ERRORS = (
    InvalidRequest,
    InvalidField,
    InvalidInput,
    KeyReused,
    ModelNotFound,
    ResultExpired,
    Overloaded,
    *run.FAILURES,
    BrokerUnavailable,
    FateUnknown,
    DeadlineExceeded,
    NotInTime,
)
_ACCEPTED = Success(documents.AcceptedTask, "The task was accepted.", documents.ACCEPTED_HEADERS)


@blueprint.post("/models/<name>/infer")
@blueprint.post("/models/<name>/versions/<version>/infer")
@describe(
    {
        200: Success(
            InferenceAnswer, "The outputs.", (_LENGTH,), binary=("application/octet-stream",)
        ),
        202: _ACCEPTED,
    },
    errors=_CALL_ERRORS,
    body=oip.InferenceRequest,
    binary=("application/octet-stream",),
    headers=_CALL_HEADERS,
    always=_CALL_ALWAYS,
    problems=ERRORS,
)
def run_infer(name: str, version: str | None = None) -> Response:
    """Run a model; the call is a durable task like any other."""
    here = services()
    body = compression.read_body(here.settings.limits.max_body_bytes)
    inference, form = oip.parse_infer(
        body,
        request.headers.get(oip.HEADER_LENGTH),
        name,
        version_number(version),
        here.gateway.limits,
    )
    task, result = _run(inference, body)
    if result is None:
        return documents.respond_accepted(task)
    package = here.repository.model(name).versions.get(task.version or 0)
    labels = () if package is None else package.manifest.labels
    answer, header_length = oip.write_infer(result, task.task_id, form, labels)
    response = Response(mimetype="application/json")
    if header_length is not None:
        response.mimetype = "application/octet-stream"
        response.headers[oip.HEADER_LENGTH] = str(header_length)
    compression.set_body(response, answer)
    return response


@blueprint.post("/models/<name>/generate")
@blueprint.post("/models/<name>/versions/<version>/generate")
@describe(
    {200: Generated, 202: _ACCEPTED},
    errors=_CALL_ERRORS,
    body=oip.GenerateRequest,
    headers=_CALL_HEADERS,
    always=_CALL_ALWAYS,
    problems=ERRORS,
)
def generate(name: str, version: str | None = None) -> Response:
    """Generate a text from a text, with a model that has one text input and one text output."""
    document = _generate(name, version)
    if isinstance(document, Accepted):
        return documents.respond_accepted(document)
    response = Response(mimetype="application/json")
    compression.set_body(response, documents.encode(document))
    return response


@blueprint.post("/models/<name>/generate_stream")
@blueprint.post("/models/<name>/versions/<version>/generate_stream")
@describe(
    {200: Success(None, "One event.", media_type="text/event-stream"), 202: _ACCEPTED},
    errors=_CALL_ERRORS,
    body=oip.GenerateRequest,
    headers=_CALL_HEADERS,
    always=_CALL_ALWAYS,
    problems=ERRORS,
)
def generate_stream(name: str, version: str | None = None) -> Response:
    """Generate a text from a text, as one server-sent event: models return whole texts."""
    document = _generate(name, version)
    if isinstance(document, Accepted):
        return documents.respond_accepted(document)
    event = b"data: " + documents.encode(document).strip() + b"\n\n"
    return Response(event, content_type="text/event-stream; charset=utf-8")


def _generate(name: str, version: str | None) -> dict[str, Any] | Accepted:
    here = services()
    body = compression.read_body(here.settings.limits.max_body_bytes)
    given = decode(body, oip.GenerateRequest, here.gateway.limits)
    _, package = find(here, name, version)
    if (texts := oip.texts_of(package.signature)) is None:
        raise InvalidRequest(f"{name} does not take one text and return one text; use /infer")
    if given.parameters:
        raise InvalidField(
            f"{name} takes no parameters, got {', '.join(given.parameters)}", "parameters"
        )
    inference = InferRequest({texts[0]: given.text_input}, name, version_number(version))
    task, result = _run(inference, body)
    return task if result is None else oip.write_generate(result, task.task_id, given.id)


def _run(inference: InferRequest, body: bytes) -> tuple[Accepted, bytes | None]:
    """Run a model as `:predict` does, but wait for the task of an earlier call as well.

    Returns:
      the task, and its result; None if the client does not want to wait for it.
    Raises:
      NotInTime: the task did not end in time; it goes on.
      ResultExpired: the call repeats an earlier one whose result was deleted.
    """
    here = services()
    family = f"{request.path} {request.headers.get(oip.HEADER_LENGTH)}"
    call = run.read(inference, family, body, here.settings.server.sync_wait_ms / 1000)
    task, outcome = run.predict(here.gateway, call)
    preference = call.preference
    # Errors are marked as well.
    after_this_request(lambda response: run.mark(response, preference, task.replayed))
    if preference.applied is not None and not preference.wait_s:
        return task, None
    if task.replayed:
        record, outcome = here.gateway.fetch(task.task_id, preference.wait_s)
        documents.task(task.task_id, record, outcome)  # Raises if its result is gone.
    if outcome is None:
        if preference.applied is not None:
            return task, None
        raise NotInTime(f"the task did not end in time; it goes on as /tasks/{task.task_id}")
    if outcome.error is not None:
        raise outcome.error
    return task, bytes(outcome.result)
