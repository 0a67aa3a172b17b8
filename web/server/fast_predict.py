"""gunicorn's gevent worker, with a short way for plain synchronous predicts.

WSGI's environment, Flask's routing and contexts, and a response that is sent in two pieces cost
more than all the rest that the web tier does for a call. So a POST to `.../models/<model>:predict`
that asks for nothing in particular is answered from here, in one piece, if it succeeds. All other
requests, and all other answers, are Flask's.

The heads of a client's requests are alike, and to parse one costs as much as to validate its body.
So gunicorn's parser says once what a head asks for, and the same bytes ask for the same again.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from email.utils import formatdate
from functools import lru_cache
from typing import Any, NamedTuple

from gunicorn import util
from gunicorn.http import wsgi
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader
from gunicorn.workers.ggevent import GeventWorker

from inferno.protocol.requests import is_binary, parse_predict
from web.calls import documents
from web.calls.preference import Preference
from web.routes import infer

#: Headers of requests that are not plain.
_PARTICULAR = frozenset(
    {
        "CACHE-CONTROL",
        "EXPECT",
        "IDEMPOTENCY-KEY",
        "INFERNO-STICKY-KEY",
        "INFERNO-VERSION",
        "PREFER",
        "TRANSFER-ENCODING",
        "UPGRADE",
    }
)

_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: gunicorn\r\nDate: %b\r\nConnection: %b\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
)

#: So many bytes of a request are looked at before it is taken.
_LOOK_BYTES = 65_536
#: Heads that are remembered, and the longest of them.
_HEADS = 1024
_LONGEST_HEAD = 4096


class _Plain(NamedTuple):
    """What the head of a plain predict says."""

    model: str
    body_bytes: int
    #: The client wants the connection to be closed after the answer.
    closes: bool


class Worker(GeventWorker):  # type: ignore[misc]
    """Serves the Flask app of `web.app`."""

    def init_process(self) -> None:
        """Prepare what each request needs, in the new process."""
        self._dated: tuple[int, bytes] = (0, b"")
        self._known = lru_cache(_HEADS)(self._read)
        super().init_process()

    def load_wsgi(self) -> None:
        """Load the app, and read what a plain predict needs of it."""
        super().load_wsgi()
        settings = self.wsgi.extensions["inferno"].settings
        self._preference = Preference(settings.server.sync_wait_ms / 1000)
        self._most_bytes = settings.limits.max_body_bytes
        prefixes = "|".join(map(re.escape, self.wsgi.extensions["prefixes"]))
        self._path = re.compile(f"(?:{prefixes})/models/([^/%]+):predict")

    def handle(self, listener: socket.socket, client: socket.socket, addr: Any) -> None:
        """Serve a connection: by ourselves until it asks for something else than a predict."""
        others = isinstance(client, ssl.SSLSocket) or self.cfg.proxy_protocol != "off"
        if others or self._serve(listener, client, addr):
            super().handle(listener, client, addr)
        else:
            util.close(client)

    def handle_request(
        self, listener_name: Any, req: Request, sock: socket.socket, addr: Any
    ) -> None:
        """Answer one request of a connection that asks for many things."""
        plain = self._plain(req)
        if plain is None or not self._continues():
            super().handle_request(listener_name, req, sock, addr)
        elif not self._predict(
            plain, req.body.read(), sock, lambda: (listener_name, req, sock, addr)
        ):
            raise StopIteration

    def _serve(self, listener: socket.socket, client: socket.socket, addr: Any) -> bool:
        """Answer plain predicts; return whether gunicorn shall go on with what comes then."""
        listener_name = listener.getsockname()
        client.setblocking(True)
        try:
            while True:
                seen = b""
                with self.timeout_ctx():
                    seen = client.recv(_LOOK_BYTES, socket.MSG_PEEK)
                end = seen.find(b"\r\n\r\n") + 4
                if end < 4:
                    return bool(seen)
                head = seen[:end]
                plain = (self._known if end <= _LONGEST_HEAD else self._read)(head)
                if plain is None or not self._continues():
                    return True
                body = _receive(client, end + plain.body_bytes)[end:]
                if len(body) < plain.body_bytes:
                    return False

                def call(head: bytes = head, body: bytes = body) -> tuple[Any, ...]:
                    req = Request(self.cfg, IterUnreader([head, body]), addr)
                    return listener_name, req, client, addr

                if not self._predict(plain, body, client, call):
                    return False
        except StopIteration:
            return False
        except OSError as exc:
            if exc.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                self.log.exception("Socket error processing request.")
            return False
        except Exception:
            self.log.exception("Error handling request")
            return False

    def _continues(self) -> bool:
        """Return whether this process may answer one more request without gunicorn's looking."""
        return bool(self.nr + 1 < self.max_requests)

    def _predict(
        self,
        plain: _Plain,
        body: bytes,
        sock: socket.socket,
        request: Callable[[], tuple[Any, ...]],
    ) -> bool:
        """Answer one plain predict; return whether the connection goes on.

        Args:
          plain: what its head says.
          body: all of it.
          sock: the client's connection.
          request: gives the arguments of `handle_request`, for Flask to answer.
        Raises:
          StopIteration: Flask has answered, and the connection does not go on.
        """
        self.nr += 1
        try:
            wanted = parse_predict(body, plain.model)
            ran = infer.run(self.wsgi.extensions["inferno"], wanted, self._preference, None, sock)
        except Exception as exc:
            error = exc
            self._answer(
                lambda: self.wsgi.make_response(self.wsgi.handle_user_exception(error)), request()
            )
            return True
        outcome = ran[1]
        if outcome is None or outcome.error is not None or wanted.by_instance:
            self._answer(lambda: infer.predicted(ran, wanted, body, self._preference), request())
            return True
        document = documents.succeeded(outcome)
        goes_on = self.alive and not plain.closes
        connection = b"keep-alive" if goes_on else b"close"
        sock.sendall(_HEAD % (self._date(), connection, len(document), document))
        return goes_on

    def _read(self, head: bytes) -> _Plain | None:
        """Return what the head of a request says, or None when it is not one of a plain predict."""
        unreader = IterUnreader([head])
        try:
            plain = self._plain(Request(self.cfg, unreader, ""))
        except Exception:
            return None  # gunicorn tells its client what is wrong with it.
        # gunicorn may see its end elsewhere: lines may also end with a line feed alone.
        return None if unreader.take_buffered() else plain

    def _plain(self, req: Request) -> _Plain | None:
        """Return what a plain predict asks for, or None when the request is something else."""
        path = self._path.fullmatch(req.path)
        if path is None or req.method != "POST":
            return None
        size = ""
        for name, value in req.headers:
            if name in _PARTICULAR:
                return None
            if name == "CONTENT-LENGTH":
                size = value
            elif name == "CONTENT-TYPE" and is_binary(value):
                return None
        if not size.isdigit() or int(size) > self._most_bytes:
            return None
        return _Plain(path[1], int(size), req.should_close())

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


def _receive(sock: socket.socket, size: int) -> bytes:
    """Return so many bytes, or fewer when the client ends the connection."""
    received = sock.recv(size)
    if len(received) == size or not received:
        return received
    chunks, missing = [received], size - len(received)
    while missing and (chunk := sock.recv(missing)):
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)
