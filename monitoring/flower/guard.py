"""Flower answers browsers by the same rules as the web tier.

Flower's API shuts workers down and revokes tasks. Without a login, Flower itself checks neither
`Host` nor `Origin`, and with `FLOWER_UNAUTHENTICATED_API` it lets every page read its answers.
"""

from __future__ import annotations

import json
from typing import Any

from flower.app import Flower
from flower.views import BaseHandler
from tornado.httputil import HTTPServerRequest
from tornado.web import RequestHandler

from inferno.errors import ForeignOrigin, InfernoError
from inferno.protocol.browsers import BrowserRules

#: Headers of every answer. Flower's pages have inline scripts, so they get no stricter policy.
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; object-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

#: Largest body of a call to Flower, in bytes, and the longest time for it, in seconds.
MOST_BODY_BYTES = 1_000_000
BODY_TIMEOUT_S = 10.0


class Refusal(RequestHandler):
    """Answers a refused call with its problem."""

    def initialize(self, error: InfernoError) -> None:
        """Store why the call is refused."""
        self._error = error

    def check_xsrf_cookie(self) -> None:
        """Skip Flower's check: the call is refused anyway."""

    def prepare(self) -> None:
        """Answer, whatever the method is."""
        self.set_status(self._error.status)
        self.set_header("Content-Type", "application/problem+json")
        self.finish(json.dumps(self._error.problem()))


def install(rules: BrowserRules) -> None:
    """Check each call to Flower before one of its handlers sees it.

    Args:
      rules: know Flower's names; no other site's pages are allowed.
    """
    find_handler = Flower.find_handler

    def find(self: Flower, request: HTTPServerRequest, **kwargs: Any) -> Any:
        # Flower's forms are small. Tornado would take 100 MB, however slowly.
        request.connection.set_max_body_size(MOST_BODY_BYTES)  # type: ignore[union-attr]
        request.connection.set_body_timeout(BODY_TIMEOUT_S)  # type: ignore[union-attr]
        headers = {name.lower(): value for name, value in request.headers.get_all()}
        try:
            rules.check(request.method or "", headers)
        except ForeignOrigin:
            error = ForeignOrigin("a page of another site made this call; only Flower's own may")
            return self.get_handler_delegate(request, Refusal, {"error": error})
        except InfernoError as exc:
            return self.get_handler_delegate(request, Refusal, {"error": exc})
        return find_handler(self, request, **kwargs)

    def set_default_headers(self: RequestHandler) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    Flower.find_handler = find
    # Flower's own would let every page read its answers; Tornado's handler of files has none.
    BaseHandler.set_default_headers = set_default_headers
    RequestHandler.set_default_headers = set_default_headers  # type: ignore[method-assign]
