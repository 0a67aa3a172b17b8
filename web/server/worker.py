"""gunicorn's gevent worker: serves plain predicts the short way, and all else through Flask.

gunicorn accepts connections and parses heads. Reading from clients and writing to them is done
here, because its own loops know no limits: see `web.server.connection`.
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Any

from gevent import GreenletExit
from gunicorn import util
from gunicorn.http import wsgi
from gunicorn.workers.ggevent import GeventWorker

from inferno.errors import InfernoError, ServerBusy
from web.server import head
from web.server.answer import Answer, refusal
from web.server.body import Body, Refused
from web.server.connection import Connection, Connections, Limits, Phase, address_of
from web.server.fast_predict import Exchange, FastPredict

#: Errors of a connection whose client has left.
_LEFT = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)


class Worker(GeventWorker):  # type: ignore[misc]
    """Serves the Flask app of `web.app`."""

    def load_wsgi(self) -> None:
        """Load the app and prepare the short way."""
        super().load_wsgi()
        self._fast = FastPredict(self.wsgi, self.cfg)
        settings = self.wsgi.extensions["inferno"].settings
        self._connections = Connections(Limits.of(settings))
        self._most_body_bytes = settings.limits.max_body_bytes

    def notify(self) -> None:
        """Tell the parent once a second that this process lives; also end slow connections."""
        super().notify()
        try:
            self._connections.reap(stopping=not self.alive)
        except Exception:
            # This is the main loop of the process, which goes on.
            self.log.exception("Slow connections could not be ended")

    def handle(self, listener: socket.socket, client: socket.socket, peer: Any) -> None:
        """Serve a connection until one side ends it."""
        client.setblocking(True)
        connection = self._connections.admit(client, address_of(peer))
        if connection is None:
            util.write_nonblock(client, refusal(ServerBusy("too many connections; try again")))
            util.close(client)
            return
        try:
            if isinstance(client, ssl.SSLSocket) and not self._shake_hands(client, connection):
                return
            name = listener.getsockname()
            while self._serve_one(connection, name, peer):
                connection.end_exchange()
        except OSError as exc:
            if not isinstance(exc, ssl.SSLError) and exc.errno not in _LEFT:
                self.log.exception("Socket error processing request.")
        except (GreenletExit, SystemExit):
            pass
        except Exception:
            self.log.exception("Error handling request")
        finally:
            self._connections.leave(connection)
            util.close(client)

    def _shake_hands(self, client: ssl.SSLSocket, connection: Connection) -> bool:
        """Begin TLS within the time limit of a head; return whether the client can."""
        connection.enter(Phase.HEAD)
        try:
            client.do_handshake()
        except OSError as exc:
            self.log.info("TLS handshake with %s failed: %s", connection.address, exc)
            return False
        return True

    def _serve_one(self, connection: Connection, name: Any, peer: Any) -> bool:
        """Serve the next request of a connection; return whether there may be another one."""
        try:
            text = connection.read_head()
            if text is None:
                return False
            plain = self._fast.read_head(text)
            request = None if plain is not None else head.parse(self.cfg, text, peer)
        except InfernoError as exc:
            # What follows a malformed head on its connection is not a request.
            connection.sendall(refusal(exc))
            connection.linger()
            return False
        self.nr += 1
        if self.nr >= self.max_requests:
            self.alive = False
        size = plain.body_bytes if plain is not None else head.body_size(request)
        body = Body(connection, size, self._most_body_bytes)
        try:
            if plain is not None:
                goes_on = self._fast.answer(Exchange(plain, text, body, peer, name), self.alive)
            else:
                goes_on = self._answer(request, body, connection, peer, name)
                # Flask may have answered without a wait in which others have their turn.
                connection.rest()
        except Refused as exc:
            connection.sendall(refusal(exc.error))
            goes_on = False
        if goes_on:
            body.skip()
        if not body.finished:
            connection.linger()
        return goes_on and body.finished

    def _answer(
        self, request: Any, body: Body, connection: Connection, peer: Any, name: Any
    ) -> bool:
        """Answer a request through Flask; return whether the connection goes on."""
        request.body = body
        response, environ = wsgi.create(request, connection, peer, name, self.cfg, Answer, (body,))
        environ["wsgi.multithread"] = True
        # WebSockets take the connection over.
        environ["gunicorn.socket"] = connection.sock
        connection.serve()
        if not self.alive:
            response.force_close()
        try:
            parts = self.wsgi(environ, response.start_response)
            try:
                for part in parts:
                    response.write(part)
                response.close()
            finally:
                if hasattr(parts, "close"):
                    parts.close()
        except StopIteration:
            # A WebSocket has ended.
            return False
        return not response.should_close()
