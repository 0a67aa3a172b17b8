"""Ports and files of this machine: which are free, and which process uses them."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from inferno.errors import ConfigurationError


def free_port() -> int:
    """Return a loopback port on which no process listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(host: str, port: int, variable: str) -> None:
    """Check that a process can listen on a port.

    Args:
      host: address to listen on, such as ``127.0.0.1``.
      port: port to listen on; 0 is always free.
      variable: the setting that chooses the port, for the error's advice.

    Raises:
      ConfigurationError: the port is in use; names the process, if this user may know it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise ConfigurationError(
            f"{host} is not an address to listen on: {exc.strerror}."
        ) from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # As gunicorn does: closed connections that linger (TIME_WAIT) do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise ConfigurationError(
                    f"Port {port} on {host} cannot be used: {exc.strerror}. "
                    f"Set {variable} to another port."
                ) from None
            raise ConfigurationError(
                f"Port {port} on {host} is in use{_port_user(port)}. "
                f"Stop that process or set {variable} to another port."
            ) from None


def file_user(path: Path) -> str:
    """Return `` by process 12 (name)`` for the oldest process that has a file open.

    Empty when the system does not tell, as for another user's process.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == str(path) for file in process.open_files()):
                return _by(process)
    return ""


def _port_user(port: int) -> str:
    """Return `` by process 12 (name)`` for the oldest process that listens on a port.

    Empty when the system does not tell: on macOS, or for another user's process.
    """
    with suppress(psutil.Error):
        pids = [
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr.port == port
            and connection.pid is not None
        ]
        if pids:
            return _by(psutil.Process(min(pids)))
    return ""


def _by(process: psutil.Process) -> str:
    return f" by process {process.pid} ({process.name()})"
