"""Admission: every call passes `admit` before anything else of it is read.

The hook is the place for keys, tenants and limits. It runs once for each HTTP request and once for
each WebSocket: in Flask before the view, and on the short way of predicts before the body is read.

What browsers are told about an answer is here too: headers that keep it from being misused by other
pages, and those by which allowed pages may read it (CORS).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flask import Flask, Response, request

from inferno.protocol.browsers import BrowserRules


@dataclass(frozen=True)
class Head:
    """What is known of a call before its body is read."""

    method: str
    #: Path of the URL, decoded, without the query.
    path: str
    #: Values by lower-case name.
    headers: Mapping[str, str]


#: Returns if a call is admitted; raises an `InfernoError` to refuse it.
Admit = Callable[[Head], None]

#: Headers of every answer: it is what its type says, and pages of other sites cannot include it.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}

#: Headers of pages, which load nothing from other hosts, have nothing inline and fit in no frame.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}

#: Answer to a browser that asks what an allowed page may send. Routes check methods and headers
#: themselves. The wildcard does not include `Authorization`.
PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Max-Age": "600",
}


def admission(rules: BrowserRules) -> Admit:
    """Return the hook that admits every call but those of foreign pages."""

    def admit(head: Head) -> None:
        rules.check(head.method, head.headers)

    return admit


def register(app: Flask, admit: Admit, rules: BrowserRules) -> None:
    """Run a hook before every view of an app, and complete every answer.

    Args:
      app: the app.
      admit: raises an error to refuse a call.
      rules: name the origins that may read answers.
    """
    app.extensions["admit"] = admit

    @app.before_request
    def check() -> Response | None:
        headers = {name.lower(): value for name, value in request.headers}
        admit(Head(request.method, request.path, headers))
        return _preflight(rules)

    @app.after_request
    def complete(response: Response) -> Response:
        response.headers.update(HEADERS)
        if response.mimetype == "text/html":
            response.headers.update(PAGE_HEADERS)
        if rules.shares:
            _share(response, rules)
        return response


def _preflight(rules: BrowserRules) -> Response | None:
    """Answer what an allowed page may send; None if the call is anything else."""
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not asks or not rules.allows(request.headers.get("Origin", "")):
        return None
    return Response(status=204, headers=PREFLIGHT_HEADERS)


def _share(response: Response, rules: BrowserRules) -> None:
    """Let allowed pages read an answer and all its headers."""
    response.vary.add("Origin")
    origin = request.headers.get("Origin")
    if origin is not None and rules.allows(origin):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "*"
