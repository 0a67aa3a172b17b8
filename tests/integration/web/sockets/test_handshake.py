"""Handshakes on a real web process: what is refused, how, and that nothing of it stays."""

from __future__ import annotations

import pytest

from tests.integration.web.sockets.conftest import problem
from tests.integration.web.sockets.raw import RawSocket, connect, random_key, request


def ask(server, text):
    """Send a request and return the whole answer."""
    with connect(server.address) as sock:
        sock.sendall(text)
        sock.settimeout(5)
        answer = b""
        end = b"\r\n\r\n" if text.startswith(b"HEAD") else b"}"
        while end not in answer:
            data = sock.recv(65_536)
            if not data:
                break
            answer += data
        return answer


def status(answer):
    return int(answer.split(b" ", 2)[1])


MALFORMED = {
    "no key": (request({"Sec-WebSocket-Key": None}), 400),
    "empty key": (request({}, more="Sec-WebSocket-Key:\r\n").replace(b"AAAA", b""), 400),
    "short key": (request({"Sec-WebSocket-Key": "AAAA"}), 400),
    "key that is no base64": (request({"Sec-WebSocket-Key": "!" * 24}), 400),
    "two keys": (request({}, more=f"Sec-WebSocket-Key: {random_key()}\r\n"), 400),
    "old version": (request({"Sec-WebSocket-Version": "8"}), 426),
    "two versions": (request({"Sec-WebSocket-Version": "13, 8"}), 426),
    "no version": (request({"Sec-WebSocket-Version": None}), 426),
    "other upgrade": (request({"Upgrade": "h2c"}), 426),
    "two upgrades": (request({"Upgrade": "websocket, h2c"}), 426),
    "no upgrade": (request({"Upgrade": None}), 426),
    "connection without upgrade": (request({"Connection": "keep-alive"}), 426),
    "plain request": (b"GET /ws HTTP/1.1\r\nHost: here\r\n\r\n", 426),
    "post": (request({}, "POST", more="Content-Length: 0\r\n"), 405),
    "head": (request({}, "HEAD"), 400),
    "body": (request({}, more="Content-Length: 2\r\n") + b"{}", 400),
    "chunked body": (request({}, more="Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n", 400),
    "path that is no socket": (request({}, path="/health/live"), 400),
}


@pytest.mark.parametrize(("text", "expected"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_handshake_is_refused(server, text, expected):
    answer = ask(server, text)
    assert status(answer) == expected
    head = answer.partition(b"\r\n\r\n")[0]
    if not text.startswith(b"HEAD"):
        assert problem(answer)["status"] == expected
    assert (b"Sec-WebSocket-Version: 13" in head) == (expected == 426)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"},
        {"Sec-WebSocket-Extensions": "\xff, ;;=, x-webkit-deflate-frame"},
        {"Sec-WebSocket-Protocol": ", ,\xe9,chat"},
        {"Connection": "keep-alive, Upgrade", "Upgrade": "WebSocket"},
        {"X-Odd": "\xe9\xff"},
    ],
)
def test_handshake_agrees_to_nothing_besides_the_protocol(server, headers):
    with RawSocket(server.address, headers) as ws:
        assert b"Sec-WebSocket-Extensions" not in ws.head
        assert b"Sec-WebSocket-Protocol" not in ws.head
        ws.say(type="ping", id=1)
        assert ws.hear() == {"type": "pong", "id": 1}


def test_refused_handshakes_leave_nothing_open(server, until):
    assert server.get("/health/live") == 200
    before = server.descriptors()
    for text, _ in MALFORMED.values():
        for _ in range(4):
            with connect(server.address) as sock:
                sock.sendall(text)
    until(lambda: server.descriptors() <= before, 20)


def test_address_can_open_only_so_many_sockets(server, until):
    sockets = [RawSocket(server.address) for _ in range(8)]
    answer = ask(server, request({}))
    assert (status(answer), problem(answer)["code"]) == (429, "overloaded")
    assert b"Retry-After: " in answer
    # The others go on, and a place is free when one leaves.
    sockets[0].say(type="ping", id=1)
    assert sockets[0].hear() == {"type": "pong", "id": 1}
    for ws in sockets:
        ws.sock.close()

    def opens():
        with connect(server.address) as sock:
            sock.sendall(request({}))
            return status(sock.recv(65_536)) == 101

    until(opens, 10)
