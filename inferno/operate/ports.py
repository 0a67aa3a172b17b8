"""Who uses a port or a file of this machine."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from inferno.errors import ConfigurationError


def free_port() -> int:
    """Return a port of the loopback address on which nobody listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(host: str, port: int, variable: str) -> None:
    """Make sure that a process could listen there.

    Args:
      host: the address, such as ``127.0.0.1``.
      port: the port; 0 is always free.
      variable: the setting that chooses the port, for the error's advice.

    Raises:
      ConfigurationError: it could not; says who has the port, as far as this user may know.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise ConfigurationError(
            f"{host} is not an address to listen on: {exc.strerror}."
        ) from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # As gunicorn does it: connections that still wait to be forgotten do not count.
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
                f"Port {port} on {host} is in use{by_whom(_listening_sockets(port))}. "
                f"Stop that process or set {variable} to another port."
            ) from None


def _listening_sockets(port: int) -> set[str]:
    """Return the sockets that listen on a port, as /proc names them."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with suppress(OSError):
            for row in table.read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = row.split()[:10]
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{inode}]")
    return sockets


def by_whom(files: set[str]) -> str:
    """Return `` by process 12 (name)``, the oldest that has one of the files open.

    Empty where /proc does not tell: on macOS, or for another user's process.
    """
    with suppress(OSError):
        for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda entry: int(entry.name)):
            with suppress(OSError):
                if any(os.readlink(fd) in files for fd in (process / "fd").iterdir()):
                    return f" by process {process.name} ({(process / 'comm').read_text().strip()})"
    return ""
