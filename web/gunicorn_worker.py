"""gunicorn's gevent worker, with a short way for plain synchronous predicts.

WSGI's environment, Flask's routing and contexts, and a response that is sent in two pieces cost
more than all the rest that the web tier does for a call. So a POST to `.../models/<model>:predict`
that asks for nothing in particular is answered from here, in one piece, if it succeeds. All other
requests, and all other answers, are Flask's.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterable
from email.utils import formatdate
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.message import Request
from gunicorn.workers.ggevent import GeventWorker

from inferno.protocol.requests import is_binary, parse_predict
from web import documents, infer
from web.preference import Preference

#: Headers of requests that are not plain.
_PARTICULAR = frozenset(
    {"IDEMPOTENCY-KEY", "PREFER", "CACHE-CONTROL", "TRANSFER-ENCODING", "EXPECT", "UPGRADE"}
)

_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: gunicorn\r\nDate: %b\r\nConnection: %b\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
)


class Worker(GeventWorker):  # type: ignore[misc]
    """Serves the Flask app of `web.app`."""

    def init_process(self) -> None:
        """Prepare what each request needs, in the new process."""
        self._dated: tuple[int, bytes] = (0, b"")
        super().init_process()

    def load_wsgi(self) -> None:
        """Load the app, and read what a plain predict needs of it."""
        super().load_wsgi()
        settings = self.wsgi.extensions["inferno"].settings
        self._preference = Preference(settings.server.sync_wait_ms / 1000)
        self._most_bytes = settings.limits.max_body_bytes
        prefixes = "|".join(map(re.escape, self.wsgi.extensions["prefixes"]))
        self._path = re.compile(f"(?:{prefixes})/models/([^/]+):predict")

    def handle_request(
        self, listener_name: Any, req: Request, sock: socket.socket, addr: Any
    ) -> None:
        """Answer one request."""
        model = self._plain(req)
        if model is None:
            super().handle_request(listener_name, req, sock, addr)
            return
        self.nr += 1
        body = req.body.read()
        try:
            wanted = parse_predict(body, model)
            ran = infer.run(self.wsgi.extensions["inferno"], wanted, self._preference, None, sock)
        except Exception as exc:
            error = exc
            self._answer(
                lambda: self.wsgi.make_response(self.wsgi.handle_user_exception(error)),
                (listener_name, req, sock, addr),
            )
            return
        outcome = ran[1]
        if outcome is None or outcome.error is not None:
            self._answer(
                lambda: infer.predicted(ran, body, self._preference),
                (listener_name, req, sock, addr),
            )
            return
        document = documents.succeeded(outcome)
        goes_on = self.alive and not req.should_close()
        connection = b"keep-alive" if goes_on else b"close"
        sock.sendall(_HEAD % (self._date(), connection, len(document), document))
        if not goes_on:
            raise StopIteration

    def _plain(self, req: Request) -> str | None:
        """Return the model of a plain predict, or None when the request is something else."""
        path = self._path.fullmatch(req.path)
        if path is None or req.method != "POST" or self.nr + 1 >= self.max_requests:
            return None
        size = ""
        for name, value in req.headers:
            if name in _PARTICULAR:
                return None
            if name == "CONTENT-LENGTH":
                size = value
            elif name == "CONTENT-TYPE" and is_binary(value):
                return None
        return path[1] if size.isdigit() and int(size) <= self._most_bytes else None

    def _answer(self, render: Callable[[], Any], request: tuple[Any, ...]) -> None:
        """Answer as Flask would, with what is rendered in a context of the request."""
        listener_name, req, sock, addr = request
        response, environ = wsgi.create(req, sock, addr, listener_name, self.cfg)
        if not self.alive:
            response.force_close()
        with self.wsgi.request_context(environ):
            chunks: Iterable[bytes] = render()(environ, response.start_response)
            for chunk in chunks:
                response.write(chunk)
        response.close()
        if response.should_close():
            raise StopIteration

    def _date(self) -> bytes:
        now = int(time.time())
        if self._dated[0] != now:
            self._dated = now, formatdate(now, usegmt=True).encode()
        return self._dated[1]
