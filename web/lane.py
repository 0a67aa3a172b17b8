"""The shortest way in: a plain synchronous predict, past Flask's routing.

Matching a route and making Flask's contexts, request and response costs more than all the rest that
the web tier does for a call. So a POST to ``.../models/<model>:predict`` that says nothing in
particular is run here; whatever is out of the ordinary is Flask's, errors included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask import Flask

from inferno.settings import Settings
from web import documents, infer
from web.preference import Preference

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: Headers that ask for more than the result.
_PARTICULAR = (
    "HTTP_IDEMPOTENCY_KEY", "HTTP_PREFER", "HTTP_TRANSFER_ENCODING", "HTTP_CACHE_CONTROL",
)  # fmt: skip


class PredictLane:
    """WSGI middleware in front of a Flask app."""

    def __init__(self, app: Flask, settings: Settings, prefixes: Iterable[str]) -> None:
        """Stand in front of an app.

        Args:
          app: has the same route, for all other calls.
          settings: how long a call waits, and the size of its body.
          prefixes: of the routes.
        """
        self._flask = app
        self._app: WSGIApplication = app.wsgi_app
        self._preference = Preference(settings.server.sync_wait_ms / 1000)
        self._most_bytes = settings.limits.max_body_bytes
        self._path = re.compile(f"(?:{'|'.join(prefixes)})/models/([^/]+):predict")

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        model = self._model(environ)
        if model is None:
            return self._app(environ, start_response)
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        try:
            ran = infer.run(
                self._flask.extensions["inferno"], model, body, self._preference, None, environ
            )
            outcome = ran[1]
            if outcome is None or outcome.error is not None:
                with self._flask.request_context(environ):
                    return infer.predicted(ran, body, self._preference)(environ, start_response)
        except Exception as exc:
            with self._flask.request_context(environ):
                answer = self._flask.make_response(self._flask.handle_user_exception(exc))
                return answer(environ, start_response)
        document = documents.succeeded(outcome)
        start_response(
            "200 OK",
            [("Content-Type", "application/json"), ("Content-Length", str(len(document)))],
        )
        return [document]

    def _model(self, environ: WSGIEnvironment) -> str | None:
        """Return the model of a plain predict, or None when it is something else."""
        path = self._path.fullmatch(environ["PATH_INFO"])
        if path is None or environ["REQUEST_METHOD"] != "POST":
            return None
        if any(name in environ for name in _PARTICULAR):
            return None
        size = environ.get("CONTENT_LENGTH") or "-"
        plain = size.isdigit() and int(size) <= self._most_bytes
        return path[1] if plain else None
