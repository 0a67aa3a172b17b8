"""Inferno's gunicorn settings, for the peers that are Flask apps."""

from bench.peers.forward import PORT
from web import gunicorn_conf as own

bind = f"127.0.0.1:{PORT}"
workers = own.workers
# gunicorn's own worker: the short way for predicts is Inferno's.
worker_class = "gevent"
worker_connections = own.worker_connections
http_parser = own.http_parser
keepalive = own.keepalive
graceful_timeout = own.graceful_timeout
accesslog = own.accesslog
control_socket_disable = own.control_socket_disable
