"""Receivers of webhooks: a real HTTP server that notes what it is sent, and hostile ones."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    #: By name in lower case.
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Receiver:
    """Answers each path with its statuses in turn, and with the last of them ever after."""

    port: int = 0
    #: By path; 200 for others.
    statuses: dict[str, list[int]] = field(default_factory=dict)
    #: Where answers of 300 to 399 lead.
    location: str = ""
    received: list[Received] = field(default_factory=list)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """Return the URL of a path."""
        return f"http://{host}:{self.port}{path}"

    def at(self, path: str) -> list[Received]:
        """Return what came to a path."""
        return [request for request in self.received if request.path == path]


@contextmanager
def receiver(tls: SSLContext | None = None) -> Iterator[Receiver]:
    """Run a receiver on a free port of 127.0.0.1."""
    here = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            statuses = here.statuses.get(self.path, [200])
            status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
            here.received.append(Received(self.path, headers, body))
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", here.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that refuses the certificate hangs up."""

    with Server(("127.0.0.1", 0), Handler) as server:
        here.port = server.server_address[1]
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield here
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def hostile_receiver(
    misbehave: Callable[[socket.socket, threading.Event], None], host: str = "127.0.0.1"
) -> Iterator[str]:
    """Run a server that may do anything with its connections; yields its host and port.

    Args:
      misbehave: called with each connection, in a thread, and with an event that is set at the end.
        It may raise OSError.
      host: address to listen on.
    """
    done, threads = threading.Event(), []

    def talk(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            misbehave(connection, done)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                threads.append(threading.Thread(target=talk, args=(connection,)))
                threads[-1].start()

    with socket.create_server((host, 0), backlog=1024) as server:
        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield f"{host}:{server.getsockname()[1]}"
        finally:
            done.set()
            # Wakes the thread that accepts.
            server.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
