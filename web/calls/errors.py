"""Errors as clients see them: RFC 9457 problems, whatever went wrong.

The Open Inference Protocol, under `/v2`, has a form of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from flask import Flask, Response, current_app, request
from msgspec import Meta
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.wrappers import Response as AnyResponse

from inferno.errors import InfernoError, Overloaded, PayloadTooLarge, RequestInProgress
from web.calls import documents
from web.calls.disconnect import Disconnected

log = logging.getLogger(__name__)

#: When a client may try again after a 503, in seconds.
RETRY_AFTER_S = 2
#: When a client may ask again for a request that is in progress, in seconds.
IN_PROGRESS_S = 1
#: Status of a call whose client has left, as nginx has it; nobody receives it.
CLIENT_CLOSED_REQUEST = 499
#: What clients are told about an unexpected error.
UNEXPECTED = InfernoError("an unexpected error; the log of the server has the details")


class OipError(TypedDict):
    """An error in the form of the Open Inference Protocol."""

    error: Annotated[str, Meta(description="What was expected, and what came; for people.")]
    code: Annotated[
        str, Meta(description="Name of the error, which does not change; for programs.")
    ]


def register(app: Flask) -> None:
    """Render every error of an app here."""
    app.register_error_handler(Disconnected, _client_left)
    app.register_error_handler(InfernoError, problem)
    app.register_error_handler(HTTPException, _http_problem)
    app.register_error_handler(Exception, _unexpected)


def problem(error: InfernoError, **extensions: Any) -> Response:
    """Answer with an error.

    Args:
      error: the error.
      extensions: further members of the problem, such as `task_id`.
    """
    if error.status >= 500:
        log.warning("%s %s: %s", request.method, request.path, error)
    response = _respond({**error.problem(), **extensions})
    if isinstance(error, Overloaded):
        response.headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, RequestInProgress):
        response.headers["Retry-After"] = str(IN_PROGRESS_S)
    return response


def _http_problem(error: HTTPException) -> AnyResponse:
    if error.code is None or error.code < 400:
        return error.get_response()
    if isinstance(error, RequestEntityTooLarge):
        limit = current_app.config["MAX_CONTENT_LENGTH"]
        return problem(PayloadTooLarge(f"expected a body of at most {limit} bytes"))
    body = {
        "type": "about:blank",
        "title": error.name,
        "status": error.code,
        "detail": error.description,
        "code": error.name.lower().replace(" ", "_"),
    }
    response = _respond(body)
    for name, value in error.get_headers():
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response


def _client_left(_: Disconnected) -> Response:
    return Response(status=CLIENT_CLOSED_REQUEST)


def _unexpected(error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return _respond(UNEXPECTED.problem())


def _respond(body: Mapping[str, Any]) -> Response:
    """Answer with a problem, or with an error of the Open Inference Protocol on its routes."""
    if request.path == "/v2" or request.path.startswith("/v2/"):
        error = oip_error(body)
        # The protocol has no separate status for invalid fields.
        status = 400 if body["status"] == 422 else body["status"]
        response = Response(documents.encode(error), status, mimetype="application/json")
    else:
        response = Response(
            documents.encode(body), body["status"], mimetype="application/problem+json"
        )
    if body["status"] == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def oip_error(problem: Mapping[str, Any]) -> OipError:
    """Return a problem in the form of the Open Inference Protocol."""
    field = f"{problem['field']}: " if "field" in problem else ""
    return {"error": f"{field}{problem['detail']}", "code": problem["code"]}
