"""How any call runs: read, submitted, awaited while its client is there, and answered.

Routes, the Open Inference Protocol and the short way of plain predicts all use these functions::

    read --> submit | predict --> Ran --> answer

It covers the steps submit and deliver of a task, on the greenlet of the HTTP call.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

import msgspec
from flask import Response, request
from msgspec import Meta

from inferno.errors import (
    BrokerUnavailable,
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
from inferno.protocol.requests import InferRequest
from tasks.gateway import Gateway, Valid
from tasks.intake.submit import Accepted, new_task_id
from tasks.results.bridge import Waiter
from tasks.state.outcomes import Outcome
from tasks.state.transitions import Idempotency
from web.calls import disconnect, documents, idempotency
from web.calls.errors import problem
from web.calls.preference import PREFER, Preference, prefer
from web.openapi.describe import Header

#: Headers of requests that run a model.
HEADERS = (
    idempotency.KEY,
    PREFER,
    Header(
        "Cache-Control", "`no-cache` computes the task, without a kept result.", example="no-cache"
    ),
    Header(
        "Inferno-Version",
        "Version that answers.",
        Annotated[int, Meta(ge=1, le=999_999_999)],
        example=1,
    ),
    Header(
        "Inferno-Sticky-Key",
        "Requests with the same key are answered by the same version.",
        example="user-7",
    ),
)
#: Errors that keep a task from being accepted.
REFUSALS = (
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
#: Errors that end an accepted task, or keep one from running.
FAILURES = (TaskCancelled, ForwardFailed, WorkerLost, InputsLost, ModelUnavailable)

_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Call(NamedTuple):
    """An inference as its client asked for it."""

    request: InferRequest
    preference: Preference
    key: Idempotency | None = None
    #: The client's connection, if the server reveals it; used to notice that the client has left.
    sock: socket.socket | None = None


class Ran(NamedTuple):
    """What became of a call."""

    task: Accepted
    #: None while the task runs, and for an earlier task that the call repeats.
    outcome: Outcome | None


def read(inference: InferRequest, family: str, body: bytes, default_wait_s: float) -> Call:
    """Add what the headers of the current HTTP request ask for.

    Args:
      inference: what the body asks for.
      family: the kind of request, for which an Idempotency-Key is valid.
      body: the body of the request.
      default_wait_s: how long to wait without a `Prefer` header, in seconds.
    Raises:
      InvalidRequest: a header is malformed, or the body names another version.
    """
    key = idempotency.from_header(family, body)
    inference = _with_headers(inference, request.environ)
    preference = prefer(request.headers.get("Prefer"), default_wait_s)
    return Call(inference, preference, key, disconnect.socket_of(request.environ))


def _with_headers(inference: InferRequest, environ: Mapping[str, Any]) -> InferRequest:
    """Apply `Cache-Control`, `Inferno-Version` and `Inferno-Sticky-Key` to a request.

    Raises:
      InvalidRequest: the version is not a number, or the body names another one.
    """
    cache_control = environ.get("HTTP_CACHE_CONTROL", "").lower()
    if "no-cache" in cache_control or "no-store" in cache_control:
        inference = msgspec.structs.replace(inference, cache=False)
    if (version := environ.get("HTTP_INFERNO_VERSION")) is not None:
        if not _VERSION.fullmatch(version):
            raise InvalidRequest(f"Inferno-Version: expected a number, got {version!r:.80}")
        if inference.version not in (None, int(version)):
            raise InvalidRequest(
                f"Inferno-Version: the body names version {inference.version}; name only one"
            )
        inference = msgspec.structs.replace(inference, version=int(version))
    if sticky := environ.get("HTTP_INFERNO_STICKY_KEY"):
        inference = msgspec.structs.replace(inference, sticky=sticky)
    return inference


def submit(gateway: Gateway, call: Call) -> Ran:
    """Submit a task, and wait for it if the client prefers to.

    Raises:
      RequestError: the request is wrong.
      ServingError: the task was not accepted.
      Disconnected: the client has left, and its task was cancelled if nobody else awaits it.
    """
    valid = gateway.validate(call.request)
    if not call.preference.wait_s:
        return Ran(gateway.publish(valid, None, call.key), None)
    return _run(gateway, valid, call)


def predict(gateway: Gateway, call: Call) -> Ran:
    """Submit a task for a client that waits: as `submit`, but only if a worker is there.

    Raises:
      ModelUnavailable: no ready worker serves the model.
      RequestError, ServingError, Disconnected: as `submit`.
    """
    valid = gateway.validate(call.request)
    gateway.require_worker(valid.package, call.key)
    return _run(gateway, valid, call)


def _run(gateway: Gateway, valid: Valid, call: Call) -> Ran:
    task_id = new_task_id()
    try:
        with gateway.expect(task_id) as waiter:
            task = gateway.publish(valid, task_id, call.key)
            return Ran(task, None if task.replayed else _wait(gateway, waiter, task, call))
    except disconnect.Disconnected:
        if _cancels(gateway, call):
            # After the waiter is closed: this call no longer counts as a listener.
            disconnect.cancel_unwanted(task_id, gateway)
        raise


def _cancels(gateway: Gateway, call: Call) -> bool:
    """Return whether the task of a call is cancelled when its client leaves."""
    # A client with a key may come back for the result, and a webhook awaits it as well.
    wanted_anyway = call.key is not None or call.request.webhook is not None
    return gateway.settings.tasks.cancel_on_disconnect and not wanted_anyway


def _wait(gateway: Gateway, waiter: Waiter, task: Accepted, call: Call) -> Outcome | None:
    """Wait for as long as the client prefers.

    Raises:
      Disconnected: the client has left, and the settings say that this cancels its task; or nobody
        can tell it anything any more.
    """
    if task.outcome is not None:
        return task.outcome
    has_left = disconnect.has_hung_up if _cancels(gateway, call) else disconnect.is_cut
    outcome = disconnect.wait(waiter, task.task_id, call.preference.wait_s, call.sock, has_left)
    if outcome is None:
        # Celery stores some outcomes itself and announces them to nobody.
        with suppress(BrokerUnavailable):
            return gateway.records.outcomes([task.task_id]).get(task.task_id)
    return outcome


def answer_submit(gateway: Gateway, call: Call, ran: Ran, body: bytes) -> Response:
    """Answer a submit: with the task if it is over, otherwise with 202.

    Args:
      gateway: finds the task.
      call: the call.
      ran: its task, and the outcome if it is known.
      body: the JSON body, whose member names the 202 follows.
    """
    task, outcome = ran
    if outcome is not None or (task.replayed and call.preference.wait_s):
        # An earlier task may have ended long ago, or still run.
        wait_s = call.preference.wait_s if task.replayed else 0.0
        record, outcome = gateway.fetch(task.task_id, wait_s)
        document = documents.task(task.task_id, record, outcome)
        if outcome is not None:
            return mark(documents.respond(document), call.preference, task.replayed)
    return _accepted(call, task, body)


def answer_predict(gateway: Gateway, call: Call, ran: Ran, body: bytes) -> Response:
    """Answer a predict: with the outputs, the task's error, or 202 while it runs.

    Args:
      gateway: finds an earlier task.
      call: the call.
      ran: its task, and the outcome if it is known.
      body: the JSON body, whose member names the 202 follows.
    Raises:
      ResultExpired: the call repeats an earlier one whose result was deleted.
    """
    task, outcome = ran
    if task.replayed:
        record, outcome = gateway.fetch(task.task_id)
        documents.task(task.task_id, record, outcome)  # Raises if its result is gone.
        if outcome is None and call.preference.wait_s:
            running = RequestInProgress("the first request with this Idempotency-Key still runs")
            return problem(running, task_id=task.task_id)
    if outcome is None:
        return _accepted(call, task, body)
    if outcome.error is not None:
        return mark(problem(outcome.error, task_id=outcome.task_id), None, task.replayed)
    document = documents.succeeded(outcome)
    if call.request.by_instance:
        document = documents.encode(documents.predictions(outcome))
    response = Response(document, mimetype="application/json")
    return mark(response, call.preference, task.replayed)


def _accepted(call: Call, task: Accepted, body: bytes) -> Response:
    response = documents.respond_accepted(task, _members(body))
    return mark(response, call.preference, task.replayed)


def mark(response: Response, preference: Preference | None, replayed: bool) -> Response:
    """Add the granted preference, and whether an earlier call has made the task."""
    if preference is not None and preference.applied is not None:
        response.headers["Preference-Applied"] = preference.applied
    if replayed:
        response.headers[idempotency.REPLAYED_HEADER] = "true"
    return response
