"""The fuzzer draws the same cases again, and notices each kind of fault."""

from __future__ import annotations

import pytest

from tests.fuzz.answers import faults, is_complete
from tests.fuzz.case import Case, Ending
from tests.fuzz.frames import PING, frame, handshake
from tests.fuzz.generator import Generator
from tests.fuzz.seeds import JSON, PNG, Request
from tests.fuzz.wire import Exchange

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
PROBLEM = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/problem+json\r\n"
    b'Connection: close\r\nContent-Length: 26\r\n\r\n{"code":"invalid_request"}'
)
HTML = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\n<p>"
CRASH = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/problem+json\r\n"
    b'Content-Length: 25\r\n\r\n{"code":"internal_error"}'
)
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
PONG = frame(b'{"type":"pong","id":"last"}', mask=None)

PLAIN = Case("plain", (b"",), ("POST",), Ending.WAIT)
BROKEN = Case("broken", (b"",), ("POST",), Ending.WAIT, closes=True, refused=True)
ALIVE = Case("socket", (b"", b""), ending=Ending.WAIT, socket=True, survives=True)


@pytest.mark.parametrize(
    ("case", "received", "closed"),
    [(PLAIN, OK, False), (BROKEN, PROBLEM, True), (ALIVE, SWITCHED + PONG, False)],
)
def test_a_good_answer_has_no_fault(case, received, closed):
    assert is_complete(case, received)
    assert faults(case, Exchange(received, closed, hung=False)) == []


@pytest.mark.parametrize(
    ("case", "received", "closed", "fault"),
    [
        (PLAIN, CRASH, False, "status 500"),
        (PLAIN, HTML, False, "no problem document"),
        (PLAIN, PROBLEM.replace(b"invalid_request", b"invented_by_me!"), False, "unknown code"),
        (PLAIN, OK + OK, False, "answered 2 requests in place of 1"),
        (PLAIN, b"nonsense\r\n\r\n", True, "malformed answer"),
        (PLAIN, CUT, True, "cut off"),
        (BROKEN, PROBLEM, False, "stays open"),
        (BROKEN, OK, True, "accepted with 200"),
        (BROKEN, PROBLEM + OK, True, "answered 2 requests in place of 1"),
        (ALIVE, SWITCHED, True, "does not answer any more"),
        (ALIVE, SWITCHED + b"\xff\xff", True, "malformed frame"),
        (ALIVE, SWITCHED + frame(b"[]", mask=None) + PONG, False, "unknown message"),
    ],
)
def test_a_fault_is_noticed(case, received, closed, fault):
    (found,) = faults(case, Exchange(received, closed, hung=False))
    assert fault in found


def test_a_hung_connection_is_noticed():
    assert "no answer" in faults(PLAIN, Exchange(b"", closed=False, hung=True))[0]


def test_a_seed_and_a_number_are_one_case():
    seeds = [
        Request("GET", b"/health"),
        Request("POST", b"/infer", JSON, b'{"inputs":{"a":1}}'),
        Request("POST", b"/infer", body=PNG),
    ]
    one, again, other = (Generator(seed, seeds, b"here") for seed in (1, 1, 2))
    cases = [one.case(number) for number in range(200)]
    assert cases == [again.case(number) for number in reversed(range(200))][::-1]
    assert cases != [other.case(number) for number in range(200)]


def test_frames_are_masked():
    assert PING not in frame(PING)
    assert b"Sec-WebSocket-Version: 8" in handshake(b"here", b"Sec-WebSocket-Version: 8")
