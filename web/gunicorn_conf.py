"""gunicorn's settings, filled from ours; used by the `web` line of the Procfile."""

# ruff: noqa: E402
from gevent import monkey

# Before anything else is imported, or modules keep the blocking originals.
monkey.patch_all()

import gc
import signal
from typing import Any

import gevent

from inferno.settings import load

_settings = load()

bind = f"{_settings.server.host}:{_settings.server.port}"
workers = _settings.server.processes
worker_class = "web.server.worker.Worker"
worker_connections = _settings.server.connections
# In C where gunicorn_h1c could be built, else in Python.
http_parser = "auto"
# Connections that idle this long are closed, so a stopping process waits no longer for them.
keepalive = 5
graceful_timeout = int(_settings.worker.grace_s)
loglevel = _settings.log.level.lower()
# Nothing depends on what a proxy says of the client, so nobody is asked whether he may say so.
forwarded_allow_ips = "*"
secure_scheme_headers: dict[str, str] = {}
forwarder_headers = ""
# One line per request would cost more than answering a short one.
accesslog = None
# It would create a socket in the user's home.
control_socket_disable = True


def post_worker_init(worker: Any) -> None:
    """Prepare a new process: its memory, and how it stops."""
    peers = worker.wsgi.extensions["peers"]
    # The app stays until the end. To look through it again and again for garbage takes 50 ms each
    # time, in which no request is answered.
    gc.collect()
    gc.freeze()

    # WebSockets would not end by themselves.
    def stop(number: int, frame: Any) -> None:
        worker.handle_exit(number, frame)
        # Closing takes locks, which a signal's handler must not wait for.
        gevent.spawn(peers.close)

    signal.signal(signal.SIGTERM, stop)


def worker_exit(server: Any, worker: Any) -> None:
    """Close the sockets and the connections to Redis."""
    if getattr(worker, "wsgi", None) is not None:
        worker.wsgi.extensions["peers"].close()
        worker.wsgi.extensions["inferno"].close()
