"""What the server makes of bytes that are no request, or an odd one.

After an error of framing, nobody knows where the next request begins. The connection must end, and
the bytes behind the error must not be answered as a request.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from inferno.testing.processes import web
from tests.fuzz.answers import Answer, answer_faults, read_answers
from tests.fuzz.bodies import BROKEN_CHUNKS
from tests.fuzz.heads import BROKEN_LINES, HOSTS, MARKER
from tests.integration.web.server.test_process import environment

HOST = b"127.0.0.1"
LIVE = b"GET /health/live HTTP/1.1\r\n%b\r\n\r\n"
NAMED = b"Host: " + HOST
CHUNKED = b"POST /v1/infer HTTP/1.1\r\n" + NAMED + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
#: How long a connection that must end may stay open, and one that must not is watched, in seconds.
CLOSE_S, OPEN_S = 3.0, 0.2

#: Statuses of a refusal: malformed, too large, an unknown transfer coding.
REFUSALS = {400, 413, 431, 501}


@pytest.fixture(scope="module")
def port(redis_url, repository, tmp_path_factory) -> Iterator[int]:
    log = tmp_path_factory.mktemp("hostile") / "web.log"
    with web(environment(redis_url, repository), log) as address:
        yield int(address.rpartition(":")[2])


def ask(port: int, *pieces: bytes, closes: bool = True) -> tuple[list[Answer], bool]:
    """Send pieces, each once the one before was answered; return the answers, and if it ended."""
    received, closed = bytearray(), False
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        for piece in pieces:
            sock.settimeout(CLOSE_S)
            with suppress(OSError):
                sock.sendall(piece)
            with suppress(TimeoutError):
                while not closed and (closes or len(read_answers(bytes(received), ())[0]) == 0):
                    closed = not _receive(sock, received)
        sock.settimeout(OPEN_S)
        with suppress(TimeoutError):
            while not closed:
                closed = not _receive(sock, received)
    return read_answers(bytes(received), ())[0], closed


def _receive(sock: socket.socket, received: bytearray) -> bool:
    try:
        chunk = sock.recv(65_536)
    except ConnectionResetError:
        return False
    received += chunk
    return bool(chunk)


def assert_refused(answers: list[Answer], closed: bool) -> None:
    assert closed
    assert len(answers) == 1
    assert answers[0].status in REFUSALS


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_a_broken_head_ends_the_connection(port, name):
    wire = LIVE % b"\r\n".join([NAMED, BROKEN_LINES[name], b"X-After: a"]) + MARKER % HOST
    assert_refused(*ask(port, wire))


@pytest.mark.parametrize("host", [None, b"", *HOSTS], ids=str)
def test_a_request_names_a_host(port, host):
    wire = LIVE % (b"X: a" if host is None else b"Host: " + host) + MARKER % HOST
    assert_refused(*ask(port, wire))


def test_a_request_names_one_host(port):
    wire = b"GET http://evil.example/health/live HTTP/1.1\r\n%b\r\n\r\n" % NAMED + MARKER % HOST
    assert_refused(*ask(port, wire))


@pytest.mark.parametrize("name", BROKEN_CHUNKS)
def test_a_broken_chunk_ends_the_connection(port, name):
    assert_refused(*ask(port, CHUNKED + BROKEN_CHUNKS[name] + MARKER % HOST))


def test_a_broken_chunk_behind_a_good_request_ends_the_connection(port):
    wire = LIVE % NAMED + CHUNKED + BROKEN_CHUNKS["wrong end of a chunk"] + MARKER % HOST
    answers, closed = ask(port, wire)
    assert [answer.status for answer in answers] == [200, 400]
    assert closed


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(LIVE % (NAMED + b"\r\nX A: b"), id="header"),
        pytest.param(LIVE % (NAMED + b"\r\nExpect: nonsense"), id="expectation"),
        pytest.param(LIVE % (NAMED + b"\r\nX: " + b"a" * 70_000), id="long"),
        pytest.param(CHUNKED + BROKEN_CHUNKS["wrong end of a chunk"], id="chunk"),
        pytest.param(b"nonsense\r\n\r\n", id="no HTTP"),
    ],
)
def test_a_refusal_is_a_problem_document(port, wire):
    (answer,), _ = ask(port, wire)
    assert answer.status in REFUSALS | {417}
    assert answer_faults(answer) == []


class Odd(NamedTuple):
    """A request that is odd, but whose end is known."""

    wire: bytes
    status: int
    closes: bool = False


def get(target: bytes, *lines: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    return b"\r\n".join([b"GET %b %b" % (target, version), NAMED, *lines, b"", b""])


def upgrade(*lines: bytes) -> bytes:
    return get(b"/ws", b"Upgrade: websocket", b"Connection: Upgrade", *lines)


KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
VERSION = b"Sec-WebSocket-Version: 13"

ODD = {
    "white space around a value": Odd(get(b"/health/live", b"X-A: \t b \t "), 200),
    "empty value": Odd(get(b"/health/live", b"X-A:"), 200),
    "upper case": Odd(get(b"/health/live", b"CONNECTION: KEEP-ALIVE"), 200),
    "absolute form": Odd(get(b"http://127.0.0.1/health/live"), 200),
    "Host with a port": Odd(LIVE % b"Host: 127.0.0.1:80", 200),
    "Host in IPv6": Odd(LIVE % b"Host: [::1]:80", 200),
    "HTTP/1.0 without a Host": Odd(b"GET /health/live HTTP/1.0\r\n\r\n", 200, closes=True),
    "last request": Odd(get(b"/health/live", b"Connection: close"), 200, closes=True),
    "chunk with an extension": Odd(CHUNKED + b"2;a=b\r\n{}\r\n0\r\n\r\n", 422),
    "harmless trailer": Odd(CHUNKED + b"2\r\n{}\r\n0\r\nX-A: b\r\n\r\n", 422),
    "unknown protocol": Odd(get(b"/health/live", b"Upgrade: h2c", b"Connection: Upgrade"), 200),
    "upgrade of raw bytes": Odd(get(b"/health/live", b"Upgrade: \xff", b"Connection: \xff"), 200),
    "raw bytes in a query": Odd(get(b"/tasks?limit=\xff"), 400),
    "raw bytes in a query of a text": Odd(get(b"/tasks?model=\xff\xfe"), 400),
    "encoded bytes in a query": Odd(get(b"/tasks?limit=%ff"), 400),
    "raw bytes in an unknown parameter": Odd(get(b"/tasks?\xff=\xff"), 400),
    "raw bytes in a path": Odd(get(b"/tasks/\xff"), 404),
    "other digits in a query": Odd(get(b"/tasks?limit=%D9%A3"), 400),
    "endless number in a query": Odd(get(b"/tasks?limit=" + b"9" * 3000), 400),
    "socket without a key": Odd(upgrade(VERSION), 400),
    "socket without a version": Odd(upgrade(KEY), 426),
    "socket of another version": Odd(upgrade(KEY, b"Sec-WebSocket-Version: 8"), 426),
    "socket with a short key": Odd(upgrade(b"Sec-WebSocket-Key: x", VERSION), 400),
    "socket with a key of raw bytes": Odd(upgrade(b"Sec-WebSocket-Key: \xff", VERSION), 400),
    "socket by POST": Odd(upgrade(KEY, VERSION).replace(b"GET", b"POST", 1), 405),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_request_is_answered(port, name):
    odd = ODD[name]
    answers, closed = ask(port, odd.wire, closes=odd.closes)
    assert [answer.status for answer in answers] == [odd.status]
    assert answer_faults(answers[0]) == []
    assert closed or not odd.closes


FORGED = b"/v1/tasks/%0aforged%20line%1b%5b31m" + b"a" * 4000


def test_a_path_writes_one_short_line_into_the_log(repository, tmp_path):
    log = tmp_path / "web.log"
    # Without Redis, every question about a task fails and is logged.
    env = environment("redis://127.0.0.1:1/0", repository)
    with web(env, log) as address:
        answers, _ = ask(int(address.rpartition(":")[2]), get(FORGED), closes=False)
        assert [answer.status for answer in answers] == [503]
    lines = [line for line in log.read_bytes().splitlines() if b"forged" in line]
    assert len(lines) == 1
    assert not re.match(rb"forged", lines[0])
    assert b"\x1b" not in lines[0]
    assert len(lines[0]) < 2500
