"""The log of the front end: real requests cannot forge lines of it, or write into a terminal."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from inferno.operate.ports import free_port
from inferno.testing.processes import wait_until, web


def send(address: str, request: bytes) -> bytes:
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(request)
        return sock.recv(65_536)


def test_a_path_cannot_forge_log_lines(repository: Path, log: Path) -> None:
    env = {
        # Nothing listens there, so every call fails with 503 and is logged.
        "INFERNO_REDIS__URL": f"redis://127.0.0.1:{free_port()}/0",
        "INFERNO_REPOSITORY__ROOT": str(repository),
    }
    hostile = "x%0d%0a[2026-11-30 00:00:00 +0000] [1] [CRITICAL] forged%1b[2J%c2%9b%e2%80%a8"
    hostile = hostile.replace(" ", "%20") + "y" * 3500
    with web(env, log) as address:
        get = f"GET /tasks/{hostile} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        answer = send(address, get.encode())
        assert answer.startswith(b"HTTP/1.1 503 ")
        # gunicorn's own log, of a request that is not HTTP.
        send(address, b"GET /\x1b[2J\x07\x0bforged HTTP/9.9\r\n\r\n")
        wait_until(lambda: r"[CRITICAL] forged\x1b[2J" in log.read_text())

    written = log.read_text(errors="replace")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", written)
    assert not re.search(r"^\[2026-11-30 00:00:00", written, re.MULTILINE)
    assert max(map(len, written.splitlines())) < 2500
