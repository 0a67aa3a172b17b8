"""gunicorn's configuration, filled from the platform's settings; see `web` in the Procfile."""

# ruff: noqa: E402
from gevent import monkey

# Before any other import: modules would keep the blocking originals.
monkey.patch_all()

import gc
import signal
import ssl
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent

from inferno import log_records
from inferno.errors import ConfigurationError
from inferno.settings import exposure, load
from web.server import memory

log_records.install()
_settings = load()

_host = _settings.server.host
bind = f"[{_host}]:{_settings.server.port}" if ":" in _host else f"{_host}:{_settings.server.port}"
certfile = _settings.server.certfile and str(_settings.server.certfile)
keyfile = _settings.server.keyfile and str(_settings.server.keyfile)
workers = _settings.server.processes
worker_class = "web.server.worker.Worker"
# The worker counts connections itself, so that a full process can replace slow ones. Those that it
# has replaced may still wait for a result.
worker_connections = 2 * _settings.server.connections + 100
# The parser in C if gunicorn_h1c is installed, otherwise the one in Python.
http_parser = "auto"
# The worker has its own time limits for connections.
keepalive = int(_settings.server.idle_timeout_s) or 1
limit_request_line = 8190
graceful_timeout = int(_settings.worker.grace_s)
loglevel = _settings.log.level.lower()
# The platform reads no header that a proxy adds, so any peer may send them.
forwarded_allow_ips = "*"
secure_scheme_headers: dict[str, str] = {}
forwarder_headers = ""
# Logging a line for each request would cost more than answering a short one.
accesslog = None
# A control socket would be created in the user's home directory.
control_socket_disable = True


def ssl_context(config: Any, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Leave the handshake to the worker, which limits its time and logs failures in one line."""
    context = default()
    wrap = partial(context.wrap_socket, do_handshake_on_connect=False)
    context.wrap_socket = wrap  # type: ignore[method-assign]
    return context


def on_starting(server: Any) -> None:
    """Check the certificate; warn of a front end and of a Redis that others may use.

    Raises:
      SystemExit: the certificate and its key cannot be used.
    """
    try:
        _settings.server.check_certificate()
    except ConfigurationError as exc:
        sys.exit(f"Error: {exc}")
    exposed = exposure("The front end", _settings.server.host, _settings.server.port)
    for warning in (exposed, _settings.redis.risk):
        if warning is not None:
            server.log.warning(warning)


def post_worker_init(worker: Any) -> None:
    """Prepare the memory of a new process, and how it stops."""
    peers = worker.wsgi.extensions["peers"]
    # The app lives as long as the process. Each garbage collection that looks through it would
    # take 50 ms, in which no request is answered.
    gc.collect()
    gc.freeze()
    memory.return_large_blocks()

    # WebSockets do not end by themselves.
    def stop(number: int, frame: Any) -> None:
        worker.handle_exit(number, frame)
        # Closing takes locks, for which a signal handler must not wait.
        gevent.spawn(peers.close)

    signal.signal(signal.SIGTERM, stop)


def worker_exit(server: Any, worker: Any) -> None:
    """Close the WebSockets and the connections to Redis."""
    if getattr(worker, "wsgi", None) is not None:
        worker.wsgi.extensions["peers"].close()
        worker.wsgi.extensions["inferno"].close()
