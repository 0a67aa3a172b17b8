"""gunicorn's gevent worker: serves plain predicts the short way, and all else through Flask."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Any

from gunicorn import util
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader
from gunicorn.workers.ggevent import GeventWorker

from web.server.fast_predict import Exchange, FastPredict

#: Bytes of a request that are peeked at before it is read.
_PEEK_BYTES = 65_536
_HEAD_END = b"\r\n\r\n"


class Worker(GeventWorker):  # type: ignore[misc]
    """Serves the Flask app of `web.app`."""

    def load_wsgi(self) -> None:
        """Load the app and prepare the short way."""
        super().load_wsgi()
        self._fast = FastPredict(self.wsgi, self.cfg)

    def handle(self, listener: socket.socket, client: socket.socket, addr: Any) -> None:
        """Serve a connection: the short way until a request is not a plain predict."""
        particular = (
            isinstance(client, ssl.SSLSocket)
            or self.cfg.proxy_protocol != "off"
            or not self.cfg.keepalive
        )
        if particular or self._serve_predicts(listener, client, addr):
            super().handle(listener, client, addr)
        else:
            util.close(client)

    def handle_request(
        self, listener_name: Any, req: Request, sock: socket.socket, addr: Any
    ) -> None:
        """Answer one request of a connection that gunicorn reads."""
        head = self._fast.plain(req)
        if head is None or not self._may_answer():
            super().handle_request(listener_name, req, sock, addr)
            return
        exchange = Exchange(head, sock, addr, listener_name, lambda _: req, req.body.read)
        if not self._predict(exchange):
            raise StopIteration

    def _serve_predicts(self, listener: socket.socket, client: socket.socket, addr: Any) -> bool:
        """Answer plain predicts; return whether gunicorn is to read what follows them."""
        listener_name = listener.getsockname()
        client.setblocking(True)
        try:
            while True:
                seen = b""
                with self.timeout_ctx():
                    seen = client.recv(_PEEK_BYTES, socket.MSG_PEEK)
                end = seen.find(_HEAD_END) + len(_HEAD_END)
                if end < len(_HEAD_END):
                    return bool(seen)
                text = seen[:end]
                head = self._fast.read_head(text)
                if head is None or not self._may_answer():
                    return True
                exchange = self._exchange(text, head, listener_name, client, addr)
                if not self._predict(exchange):
                    return False
                # A refused request leaves its body in the socket.
                exchange.body()
        except OSError as exc:
            if exc.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                self.log.exception("Socket error processing request.")
            return False
        except Exception:
            self.log.exception("Error handling request")
            return False

    def _exchange(
        self, text: bytes, head: Any, listener_name: Any, client: socket.socket, addr: Any
    ) -> Exchange:
        def request(body: bytes) -> Request:
            return Request(self.cfg, IterUnreader([text, body]), addr)

        def read_body() -> bytes:
            return _receive(client, len(text) + head.body_bytes)[len(text) :]

        return Exchange(head, client, addr, listener_name, request, read_body)

    def _may_answer(self) -> bool:
        """Return whether this process may answer one more request before gunicorn recycles it."""
        return bool(self.nr + 1 < self.max_requests)

    def _predict(self, exchange: Exchange) -> bool:
        self.nr += 1
        return self._fast.answer(exchange, self.alive)


def _receive(sock: socket.socket, size: int) -> bytes:
    """Return `size` bytes, or fewer if the client ends the connection."""
    received = sock.recv(size)
    if len(received) == size or not received:
        return received
    chunks, missing = [received], size - len(received)
    while missing and (chunk := sock.recv(missing)):
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)
