"""Receivers that try to hold a thread of ours, to fill our memory, or to write into our log."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable

import pytest

from inferno.protocol.webhooks import parse_address
from tests.receiver import hostile_receiver
from workers.webhooks.outbound import MAX_ANSWER_BYTES, MAX_REASON, NotReached, Outbound

#: Time limit of a call in these tests, in seconds.
TIMEOUT_S = 0.5

#: Larger than all buffers of a connection.
BODY = b"x" * 16_000_000

Misbehave = Callable[[socket.socket, threading.Event], None]


def read_request(connection: socket.socket) -> None:
    """Read a request with a short body."""
    received = b""
    while not received.endswith(b"{}"):
        received += connection.recv(65536)


def silent(connection: socket.socket, done: threading.Event) -> None:
    done.wait()


def answer(data: bytes, every_s: float = 0.0, first: bytes = b"") -> Misbehave:
    """Return a receiver that reads the request and then writes for ever."""

    def misbehave(connection: socket.socket, done: threading.Event) -> None:
        read_request(connection)
        connection.sendall(first)
        while not done.wait(every_s):
            connection.sendall(data)

    return misbehave


def read_slowly(connection: socket.socket, done: threading.Event) -> None:
    """Read a little at a time, so that every write makes some progress."""
    while not done.wait(0.02):
        connection.recv(16_384)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "misbehave",
    [
        pytest.param(silent, id="never answers"),
        pytest.param(answer(b"x", 0.01), id="status line byte by byte"),
        pytest.param(answer(b"x", 0.01, OK + b"x: "), id="header byte by byte"),
        pytest.param(answer(b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), id="interim answers"),
    ],
)
def test_a_slow_answer_is_left_in_time(misbehave: Misbehave) -> None:
    with hostile_receiver(misbehave) as host:
        outbound = Outbound(TIMEOUT_S, allow_private=True)
        began = time.monotonic()
        with pytest.raises(NotReached):
            outbound.post(parse_address(f"http://{host}/"), {}, b"{}")
        assert TIMEOUT_S <= time.monotonic() - began < TIMEOUT_S + 1.5


@pytest.mark.parametrize(
    "misbehave", [pytest.param(silent, id="not at all"), pytest.param(read_slowly, id="slowly")]
)
def test_a_receiver_that_does_not_read_the_body_is_left_in_time(misbehave: Misbehave) -> None:
    with hostile_receiver(misbehave) as host:
        outbound = Outbound(TIMEOUT_S, allow_private=True)
        began = time.monotonic()
        with pytest.raises(NotReached):
            outbound.post(parse_address(f"http://{host}/"), {}, BODY)
        assert TIMEOUT_S <= time.monotonic() - began < TIMEOUT_S + 1.5


def test_a_stalled_tls_handshake_is_left_in_time() -> None:
    with hostile_receiver(silent) as host:
        outbound = Outbound(TIMEOUT_S, allow_private=True)
        began = time.monotonic()
        with pytest.raises(NotReached):
            outbound.post(parse_address(f"https://{host}/"), {}, b"{}")
        assert time.monotonic() - began < TIMEOUT_S + 1.5


@pytest.mark.parametrize(
    "misbehave",
    [
        pytest.param(answer(b"x" * 65536), id="status line"),
        pytest.param(answer(b"x" * 65536, first=OK + b"x: "), id="header"),
        pytest.param(answer(b"x: y\r\n" * 10_000, first=OK), id="headers"),
        pytest.param(answer(b"HTTP/1.1 100 Continue\r\n\r\n" * 2000), id="interim answers"),
    ],
)
def test_an_endless_head_is_given_up_by_its_size(misbehave: Misbehave) -> None:
    with hostile_receiver(misbehave) as host:
        outbound = Outbound(60.0, allow_private=True)
        began = time.monotonic()
        with pytest.raises(NotReached):
            outbound.post(parse_address(f"http://{host}/"), {}, b"{}")
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(OK + b"content-length: 1000000000\r\n\r\n", id="a gigabyte"),
        pytest.param(OK + b"transfer-encoding: chunked\r\n\r\n", id="a chunk without end"),
        pytest.param(OK + b"content-encoding: gzip\r\n\r\n", id="compressed"),
    ],
)
def test_the_body_of_an_answer_is_not_read(head: bytes) -> None:
    sent = []

    def misbehave(connection: socket.socket, done: threading.Event) -> None:
        read_request(connection)
        connection.sendall(head)
        sent.append(0)
        while not done.is_set():
            sent[0] += connection.send(b"1" * 65536)

    with hostile_receiver(misbehave) as host:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outbound = Outbound(60.0, allow_private=True)
        assert outbound.post(parse_address(f"http://{host}/"), {}, b"{}") == 200
        # In kilobytes.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    # What the buffers of the system held.
    assert sent[0] < 20_000_000


def test_a_receiver_cannot_write_lines_or_escape_codes_into_a_message() -> None:
    def misbehave(connection: socket.socket, done: threading.Event) -> None:
        read_request(connection)
        connection.sendall(b"\x1b[31mHTTP\r\nERROR forged line " + b"x" * 10_000 + b"\r\n\r\n")

    with hostile_receiver(misbehave) as host:
        outbound = Outbound(5.0, allow_private=True)
        with pytest.raises(NotReached) as raised:
            outbound.post(parse_address(f"http://{host}/"), {}, b"{}")
    message = str(raised.value)
    assert message.startswith("RemoteProtocolError: ")
    assert message.isprintable()
    assert len(message) < MAX_REASON + 50


def test_a_head_of_ordinary_size_is_taken() -> None:
    def misbehave(connection: socket.socket, done: threading.Event) -> None:
        read_request(connection)
        header = b"x-trace: " + b"x" * 4000 + b"\r\n"
        interim = b"HTTP/1.1 103 Early Hints\r\n" + header + b"\r\n"
        connection.sendall(interim + OK + header * 10 + b"\r\n")

    assert MAX_ANSWER_BYTES > 50_000
    with hostile_receiver(misbehave) as host:
        outbound = Outbound(5.0, allow_private=True)
        assert outbound.post(parse_address(f"http://{host}/"), {}, b"{}") == 200
