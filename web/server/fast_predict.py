"""The short way of plain predicts: step submit and step deliver without WSGI and Flask.

WSGI's environment, Flask's routing and contexts, and an answer in two writes cost more than the
rest of the web tier's work for a call. A POST to `.../models/<model>:predict` whose head is plain
is therefore answered here, in one write, if it succeeds. Flask answers all other requests, and
renders all other answers: the short way has no rules of its own.

A head is plain if it has no query and only headers that change nothing about a predict. gunicorn's
parser reads it, once: parsed heads are cached by their bytes, because the heads of a client's
requests are alike and parsing one costs as much as checking its body.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache, partial
from typing import Any

from flask import Flask, Response
from gunicorn.http import wsgi
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader

from inferno.errors import InvalidRequest
from inferno.protocol.requests import parse_predict
from web.calls import documents, run
from web.calls.preference import Preference
from web.security import HEADERS, Head
from web.server.answer import Answer
from web.server.body import Body
from web.server.head import parse

#: Headers that Flask ignores on a predict, and those that `plain` checks itself. A request with
#: any other header is not plain: it may change the answer, now or for a hook of `web.security`.
_HARMLESS = frozenset(
    {
        # Read by `plain`.
        "CONNECTION",
        "CONTENT-LENGTH",
        "CONTENT-TYPE",
        # The app has no virtual hosts.
        "HOST",
        # Predicts have one representation: JSON, not compressed, in no language.
        "ACCEPT",
        "ACCEPT-ENCODING",
        "ACCEPT-LANGUAGE",
        "USER-AGENT",
        # Added by proxies; gunicorn is configured to ignore them.
        "X-FORWARDED-FOR",
        "X-FORWARDED-HOST",
        "X-FORWARDED-PORT",
        "X-FORWARDED-PROTO",
        "X-REAL-IP",
    }
)
_JSON = re.compile(r"application/json(?:\s*;\s*charset=\"?utf-8\"?)?", re.IGNORECASE)

_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: gunicorn\r\nDate: %b\r\nConnection: %b\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n"
    + "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items()).encode()
    + b"\r\n%b"
)

#: Number of heads that are cached, and the size of the longest, in bytes.
_CACHED_HEADS = 1024
_LONGEST_HEAD = 4096


class _NotPlain(Exception):
    """A head is not that of a plain predict."""


@dataclass(frozen=True)
class PlainHead:
    """What the head of a plain predict asks for. It is cached, so it holds nobody's identity."""

    head: Head
    model: str
    body_bytes: int
    #: Whether the client wants the connection to be closed after the answer.
    closes: bool


class Exchange:
    """One plain predict on a connection."""

    __slots__ = ("_body", "connection", "head", "listener_name", "peer", "reader", "text")

    def __init__(
        self,
        head: PlainHead,
        text: bytes,
        reader: Body,
        peer: Any,
        listener_name: Any,
    ) -> None:
        """Store the exchange; the body is not read yet.

        Args:
          head: the head of the request.
          text: the same, in bytes.
          reader: reads the body from the client's connection.
          peer: the client's address.
          listener_name: the server's address.
        """
        self.head = head
        self.text = text
        self.connection = reader.connection
        self.peer = peer
        self.listener_name = listener_name
        self.reader = reader
        self._body = b""

    def body(self) -> bytes:
        """Read the body.

        Raises:
          Refused: as `Body.whole`.
        """
        self._body = self.reader.whole()
        self.connection.serve()
        return self._body

    def forget(self) -> None:
        """Free the body."""
        self._body = b""

    def request(self, cfg: Any) -> Request:
        """Return gunicorn's request, for Flask."""
        return Request(cfg, IterUnreader([self.text, self._body]), self.peer)


class FastPredict:
    """Answers plain predicts of an app."""

    def __init__(self, app: Flask, cfg: Any) -> None:
        """Prepare what every request needs.

        Args:
          app: the app of `web.app`.
          cfg: gunicorn's configuration.
        """
        here = app.extensions["inferno"]
        self._app = app
        self._cfg = cfg
        self._admit = app.extensions["admit"]
        self._gateway = here.gateway
        self._preference = Preference(here.settings.server.sync_wait_ms / 1000)
        self._most_bytes = here.settings.limits.max_body_bytes
        prefixes = "|".join(map(re.escape, app.extensions["prefixes"]))
        self._path = re.compile(rf"(?:{prefixes})/models/([\w.-]+):predict", re.ASCII)
        self._cached = lru_cache(_CACHED_HEADS)(self._parse)
        #: The current second and its `Date` header.
        self._dated: tuple[int, bytes] = (0, b"")

    def read_head(self, text: bytes) -> PlainHead | None:
        """Return what a head asks for, or None if it is not plain.

        Args:
          text: from the request line to the empty line.
        """
        if not text.startswith(b"POST "):
            return None
        try:
            return self._cached(text) if len(text) <= _LONGEST_HEAD else self._parse(text)
        except _NotPlain:
            return None

    def _parse(self, text: bytes) -> PlainHead:
        """Parse a plain head.

        Raises:
          _NotPlain: the head is not plain. The cache keeps no errors, so it never holds
            credentials, and plain heads are not displaced.
        """
        try:
            head = self._plain(parse(self._cfg, text, ""))
        except InvalidRequest:
            raise _NotPlain from None  # The worker refuses malformed heads.
        if head is None:
            raise _NotPlain
        return head

    def _plain(self, req: Request) -> PlainHead | None:
        path = self._path.fullmatch(req.uri)
        if path is None or req.method != "POST" or req.version != (1, 1):
            return None
        headers: dict[str, str] = {}
        for name, value in req.headers:
            if name not in _HARMLESS or name in headers:
                return None
            headers[name] = value
        size = headers.get("CONTENT-LENGTH", "")
        if not (size.isascii() and size.isdigit()) or int(size) > self._most_bytes:
            return None
        if "CONTENT-TYPE" in headers and not _JSON.fullmatch(headers["CONTENT-TYPE"]):
            return None
        if headers.get("CONNECTION", "keep-alive").lower() not in ("keep-alive", "close"):
            return None
        head = Head("POST", req.uri, {name.lower(): value for name, value in headers.items()})
        return PlainHead(head, path[1], int(size), req.should_close())

    def answer(self, exchange: Exchange, alive: bool) -> bool:
        """Answer a plain predict; return whether the connection goes on.

        Args:
          exchange: the predict.
          alive: whether this process takes further requests.
        """
        made = self._run(exchange)
        if not isinstance(made, bytes):
            return self._render(exchange, alive, made)
        goes_on = alive and not exchange.head.closes
        connection = b"keep-alive" if goes_on else b"close"
        data = _HEAD % (self._date(), connection, len(made), made)
        # The client may read slowly, and needs nothing else.
        del made
        exchange.forget()
        exchange.connection.sendall(data)
        return goes_on

    def _run(self, exchange: Exchange) -> bytes | Callable[[], Any]:
        """Run a predict; return its document, or a function that makes any other answer."""
        head = exchange.head
        try:
            self._admit(head.head)
            body = exchange.body()
            inference = parse_predict(body, head.model, self._gateway.limits)
            call = run.Call(inference, self._preference, None, exchange.connection.sock)
            ran = run.predict(self._gateway, call)
        except Exception as exc:
            # No local name for the error: it would keep this frame, and the frame the error.
            return partial(self._app.handle_user_exception, exc)
        outcome = ran.outcome
        if outcome is None or outcome.error is not None or inference.by_instance:
            return partial(run.answer_predict, self._gateway, call, ran, body)
        return documents.succeeded(outcome)

    def _render(self, exchange: Exchange, alive: bool, respond: Callable[[], Any]) -> bool:
        """Answer as Flask does after a view; return whether the connection goes on."""
        response, environ = wsgi.create(
            exchange.request(self._cfg),
            exchange.connection,
            exchange.peer,
            exchange.listener_name,
            self._cfg,
            Answer,
            (exchange.reader,),
        )
        if not alive:
            response.force_close()
        with self._app.request_context(environ):
            answer: Response = self._app.finalize_request(respond())
            for chunk in answer(environ, response.start_response):
                response.write(chunk)
        response.close()
        # Nothing of this may have waited, so nobody else may have had a turn.
        exchange.connection.rest()
        return not response.should_close()

    def _date(self) -> bytes:
        now = int(time.time())
        if self._dated[0] != now:
            self._dated = now, formatdate(now, usegmt=True).encode()
        return self._dated[1]
