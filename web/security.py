"""Admission: every call passes `admit` before anything else of it is read.

The hook is the place for keys, tenants and limits. It runs once for each HTTP request and once for
each WebSocket: in Flask before the view, and on the short way of predicts before the body is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flask import Flask, Response, request


@dataclass(frozen=True)
class Head:
    """What is known of a call before its body is read."""

    method: str
    #: Path of the URL, decoded, without the query.
    path: str
    #: Values by lower-case name.
    headers: Mapping[str, str]


#: Headers of every answer.
HEADERS = {"X-Content-Type-Options": "nosniff"}

#: Returns if a call is admitted; raises an `InfernoError` to refuse it.
Admit = Callable[[Head], None]


def admit(head: Head) -> None:
    """Admit every call."""


def register(app: Flask, admit: Admit) -> None:
    """Run a hook before every view of an app."""
    app.extensions["admit"] = admit

    @app.before_request
    def check() -> None:
        headers = {name.lower(): value for name, value in request.headers}
        admit(Head(request.method, request.path, headers))

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response
