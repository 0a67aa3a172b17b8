"""Answers on a connection: those of Flask, and refusals of requests that never reach it."""

from __future__ import annotations

from typing import Any

import msgspec
from gunicorn import util
from gunicorn.http.wsgi import Response

from inferno.errors import InfernoError
from web.security import HEADERS
from web.server.body import Body

_REFUSAL = (
    "HTTP/1.1 {status} {title}\r\nServer: gunicorn\r\nDate: {date}\r\nConnection: close\r\n"
    "Content-Type: application/problem+json\r\nContent-Length: {size}\r\n{headers}\r\n"
)


class Answer(Response):  # type: ignore[misc]
    """gunicorn's response; it ends the connection if too much of the body is unread."""

    def __init__(self, request: Any, connection: Any, cfg: Any, body: Body) -> None:
        """Store the body of the request; see `gunicorn.http.wsgi.Response`."""
        super().__init__(request, connection, cfg)
        self._body = body

    def send_headers(self) -> None:
        """Send the head, which tells the client whether the connection goes on."""
        if not self._body.ends_soon:
            self.force_close()
        super().send_headers()


def refusal(error: InfernoError) -> bytes:
    """Return the answer to a request that ends its connection."""
    problem = error.problem()
    document = msgspec.json.encode(problem)
    headers = HEADERS if problem["status"] != 503 else {**HEADERS, "Retry-After": "2"}
    head = _REFUSAL.format(
        status=problem["status"],
        title=problem["title"],
        date=util.http_date(),
        size=len(document),
        headers="".join(f"{name}: {value}\r\n" for name, value in headers.items()),
    )
    return head.encode() + document
