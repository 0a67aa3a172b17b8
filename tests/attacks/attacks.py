"""The attacks. Each does its worst from one address for a limited time."""

from __future__ import annotations

import base64
import json
import resource
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.attacks.pictures import png
from tests.attacks.wire import (
    PING,
    Attacker,
    WebSocket,
    close_all,
    deflated,
    drain,
    frame,
    receive,
    statuses_of,
)

MB = 1_000_000
PREDICT = "/models/echo:predict"

Run = Callable[[Attacker], None]


@dataclass(frozen=True)
class Attack:
    """One kind of misbehaviour."""

    name: str
    run: Run
    #: How long it lasts unless told otherwise, in seconds.
    seconds: float
    #: The model that the bystander calls.
    bystander: str = "echo"
    #: Whether `make test` runs it, for a few seconds.
    short: bool = False

    @property
    def about(self) -> str:
        """What it does."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]


ATTACKS: dict[str, Attack] = {}


def attack(
    seconds: float = 10.0, bystander: str = "echo", *, short: bool = False
) -> Callable[[Run], Run]:
    """Register a function as an attack with its own name."""

    def register(run: Run) -> Run:
        name = run.__name__
        ATTACKS[name] = Attack(name, run, seconds, bystander, short)
        return run

    return register


@attack(10)
def calm(attacker: Attacker) -> None:
    """Nothing, for comparison."""
    attacker.wait()


# HTTP: connections that never rest, or never end


def _pipeline(attacker: Attacker, request: bytes) -> None:
    with attacker.connect() as connection:
        drain(connection)
        attacker.pour(connection, request * 2000, 1 << 40)


@attack(40, short=True)
def pipelined_gets(attacker: Attacker) -> None:
    """One connection has always the next request ready."""
    _pipeline(attacker, attacker.head("GET /health/live"))


@attack(15)
def pipelined_predicts(attacker: Attacker) -> None:
    """One connection has always the next predict ready."""
    _pipeline(attacker, attacker.post(PREDICT, b'{"inputs":{"text":"a"}}'))


def _endless(attacker: Attacker, start: bytes) -> None:
    head = attacker.head(f"POST {PREDICT}", transfer_encoding="chunked")
    with attacker.connect() as connection:
        connection.sendall(head + start)
        attacker.pour(connection, b"a" * 65536, 48 * MB)
        attacker.wait()


@attack(40, short=True)
def endless_chunk_extension(attacker: Attacker) -> None:
    """A chunk's extension of 48 MB."""
    _endless(attacker, b"1;")


@attack(40)
def endless_trailer(attacker: Attacker) -> None:
    """A trailer of 48 MB."""
    _endless(attacker, b"0\r\nx: ")


@attack(15)
def tiny_chunks(attacker: Attacker) -> None:
    """A body of chunks of one byte."""
    head = attacker.head(f"POST {PREDICT}", transfer_encoding="chunked")
    with attacker.connect() as connection:
        connection.sendall(head)
        attacker.pour(connection, b"1\r\na\r\n" * 10_000, 40 * MB)


@attack(15)
def tiny_segments(attacker: Attacker) -> None:
    """A body in segments of one byte, as fast as they go."""
    with attacker.connect() as connection:
        connection.sendall(attacker.head(f"POST {PREDICT}", content_length=11 * MB))
        attacker.pour(connection, b"a", 11 * MB)


@attack(15)
def slow_heads(attacker: Attacker) -> None:
    """200 connections that send a header a second."""
    connections = [attacker.connect() for _ in range(200)]
    for connection in connections:
        connection.sendall(attacker.head(f"POST {PREDICT}")[:-2])
    while attacker.left_s:
        for connection in connections:
            with suppress(OSError):
                connection.sendall(b"x-a: b\r\n")
        threading.Event().wait(min(1.0, attacker.left_s))
    close_all(connections)


@attack(20)
def slow_bodies(attacker: Attacker) -> None:
    """4,300 connections that have sent one byte of their body."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 20_000), limit))
    request = attacker.head(f"POST {PREDICT}", content_length=1000) + b"{"
    connections: list[socket.socket] = []
    with suppress(OSError):
        while len(connections) < 4300 and attacker.left_s:
            connections.append(attacker.connect())
            connections[-1].sendall(request)
    attacker.wait()
    close_all(connections)


@attack(10)
def resets(attacker: Attacker) -> None:
    """300 connections that are reset in the middle of a body."""
    request = attacker.post(PREDICT, b'{"inputs":{"text":"a"}}')
    for number in range(300):
        if attacker.left_s:
            with suppress(OSError), attacker.connect() as connection:
                connection.sendall(request[: -1 - number % 20])
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@attack(10, short=True)
def framing(attacker: Attacker) -> None:
    """Broken framing, followed by what may be taken for a new request."""
    chunked = attacker.head(f"POST {PREDICT}", transfer_encoding="chunked")
    broken = {
        "a size in hexadecimal notation": chunked + b"0x17\r\n",
        "line feeds only": chunked + b"5\nabcde\n0\n\n",
        "a negative size": chunked + b"-1\r\n",
        "a chunk that is too long": chunked + b"2\r\nabXX",
        "a length in the trailer": chunked + b"2\r\n{}\r\n0\r\ncontent-length: 5\r\n\r\n",
        "two lengths": attacker.head("POST /", content_length="1\r\ncontent-length: 2"),
        "a body that is too large": attacker.head(f"POST {PREDICT}", content_length=10**12),
    }
    for name, request in broken.items():
        with suppress(OSError), attacker.connect() as connection:
            connection.sendall(request)
            answer = receive(connection, 0.5)
            with suppress(OSError):
                connection.sendall(attacker.head("GET /health/live"))
            answer += receive(connection, 0.5)
            if len(statuses_of(answer)) > 1:
                attacker.findings.append(f"a request is answered after {name}")


# HTTP: bodies that are expensive


@attack(20)
def held_bodies(attacker: Attacker) -> None:
    """30 connections that hold back the end of a body of 11 MB."""
    request = attacker.head(f"POST {PREDICT}", content_length=11 * MB + 100)
    connections = [attacker.connect() for _ in range(30)]
    for connection in connections:
        with suppress(OSError):
            connection.sendall(request + b'{"inputs":{"text":"' + b"a" * (11 * MB))
    attacker.wait()
    close_all(connections)


@attack(30)
def unread_answers(attacker: Attacker) -> None:
    """20 connections that do not read their answers of 10.8 MB."""
    body = json.dumps({"inputs": {"text": ["a" * 900_000] * 12}, "cache": False}).encode()
    connections = []
    for _ in range(20):
        with suppress(OSError):
            connections.append(attacker.connect(receive_buffer=4096))
            connections[-1].sendall(attacker.post(PREDICT, body))
    attacker.wait()
    close_all(connections)


def _repeat(attacker: Attacker, request: bytes) -> None:
    while attacker.left_s:
        status, _ = attacker.call(request)
        if status >= 500 and status != 503:
            attacker.findings.append(f"status {status}")
            return


@attack(10, short=True)
def empty_lists(attacker: Attacker) -> None:
    """3.9 million empty lists as an input."""
    lists = b",".join([b"[]"] * 3_900_000)
    _repeat(attacker, attacker.post(PREDICT, b'{"inputs":{"x":[[' + lists + b"]]}}"))


@attack(10)
def many_numbers(attacker: Attacker) -> None:
    """5.5 million numbers as an input of JSON."""
    numbers = b",".join([b"1"] * 5_500_000)
    _repeat(attacker, attacker.post(PREDICT, b'{"inputs":{"x":[[' + numbers + b"]]}}"))


@attack(10)
def unknown_inputs(attacker: Attacker) -> None:
    """900,000 inputs that the model does not have."""
    names = b",".join(b'"k%d":1' % number for number in range(900_000))
    _repeat(attacker, attacker.post(PREDICT, b'{"inputs":{' + names + b"}}"))


@attack(10)
def many_instances(attacker: Attacker) -> None:
    """3.9 million empty instances."""
    instances = b",".join([b"{}"] * 3_900_000)
    _repeat(attacker, attacker.post(PREDICT, b'{"instances":[' + instances + b"]}"))


@attack(10)
def nested_lists(attacker: Attacker) -> None:
    """Lists inside each other, five million deep."""
    nested = b"[" * 5 * MB
    _repeat(attacker, attacker.post(PREDICT, b'{"inputs":{"x":' + nested))


@attack(15)
def empty_elements(attacker: Attacker) -> None:
    """3 million empty BYTES elements of the Open Inference Protocol."""
    count = 2_900_000
    tensor = {
        "name": "text",
        "datatype": "BYTES",
        "shape": [count],
        "parameters": {"binary_data_size": 4 * count},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    request = attacker.post(
        "/v2/models/echo/infer",
        head + bytes(4 * count),
        inference_header_content_length=len(head),
    )
    _repeat(attacker, request)


@attack(60, bystander="digits")
def large_pictures(attacker: Attacker) -> None:
    """A task with 108 pictures of 16 megapixels."""
    picture = base64.b64encode(png(4000, 4000)).decode()
    body = {"model": "digits", "inputs": {"image": [picture] * 108}, "cache": False}
    request = attacker.post("/infer", json.dumps(body).encode())
    status, _ = attacker.call(request)
    if status < 400:
        attacker.wait()


@attack(10)
def descriptions(attacker: Attacker) -> None:
    """20 connections that ask for the OpenAPI document over and over."""
    request = attacker.head("GET /openapi.json") * 20
    connections = [attacker.connect() for _ in range(20)]
    for connection in connections:
        drain(connection)
    while attacker.left_s:
        for connection in connections:
            with suppress(OSError):
                connection.settimeout(1)
                connection.sendall(request)
    close_all(connections)


@attack(10)
def bad_handshakes(attacker: Attacker) -> None:
    """150 malformed handshakes of WebSockets."""
    request = attacker.head(
        "GET /ws",
        upgrade="websocket",
        connection="Upgrade",
        sec_websocket_version=8,
        sec_websocket_key="x",
    )
    statuses = set()
    for _ in range(150):
        if attacker.left_s:
            with suppress(OSError), attacker.connect() as connection:
                connection.sendall(request)
                statuses.update(statuses_of(receive(connection, 0.05)))
    if 500 in statuses:
        attacker.findings.append("status 500")


# WebSockets


@attack(20)
def pings(attacker: Attacker) -> None:
    """One socket that sends pings as fast as they go."""
    with WebSocket(attacker) as socket_:
        drain(socket_.connection)
        attacker.pour(socket_.connection, frame(b"a" * 100, PING) * 1000, 1 << 40)


@attack(20)
def unread_pongs(attacker: Attacker) -> None:
    """One socket that sends pings and does not read the pongs."""
    with WebSocket(attacker, receive_buffer=4096) as socket_:
        attacker.pour(socket_.connection, frame(b"a" * 100, PING) * 1000, 1 << 40)
        attacker.wait()


@attack(30)
def large_ids(attacker: Attacker) -> None:
    """100 pings with an id of 10 MB on one socket that does not read."""
    message = frame(b'{"type":"ping","id":"' + b"a" * (10 * MB) + b'"}')
    with WebSocket(attacker, receive_buffer=4096) as socket_:
        attacker.pour(socket_.connection, message, 100 * len(message))
        attacker.wait()


@attack(30)
def unread_sockets(attacker: Attacker) -> None:
    """100 sockets that never read, with answers of 8 MB for each."""
    message = frame(b'{"type":"ping","id":"' + b"a" * MB + b'"}') * 8
    sockets = [WebSocket(attacker, receive_buffer=4096) for _ in range(100)]
    for socket_ in sockets:
        with suppress(OSError):
            socket_.connection.settimeout(0.3)
            socket_.connection.sendall(message)
    attacker.wait()
    close_all(sockets)


@attack(20)
def deflate_bombs(attacker: Attacker) -> None:
    """20 sockets with a frame that inflates to 60 MB."""
    bomb = frame(deflated(b"a" * (60 * MB)), compressed=True)
    sockets = [WebSocket(attacker, deflate=True) for _ in range(20)]
    for socket_ in sockets:
        with suppress(OSError):
            # Without the extension this is a broken frame.
            socket_.connection.sendall(bomb)
    attacker.wait()
    close_all(sockets)


@attack(20, short=True)
def large_subscriptions(attacker: Attacker) -> None:
    """5 sockets that subscribe to 100,000 tasks at once, over and over."""
    ids = [f"{number:08d}" for number in range(100_000)]
    sockets = [WebSocket(attacker) for _ in range(5)]
    for socket_ in sockets:
        drain(socket_.connection)
    while attacker.left_s:
        for socket_ in sockets:
            with suppress(OSError):
                socket_.connection.settimeout(1)
                socket_.send({"type": "subscribe", "id": 1, "task_ids": ids})
    close_all(sockets)


@attack(30)
def large_cancel(attacker: Attacker) -> None:
    """A cancel of 400,000 tasks, and 60 messages of 4 MB behind it."""
    ids = [f"{number:08d}" for number in range(400_000)]
    with WebSocket(attacker) as socket_:
        drain(socket_.connection)
        with suppress(OSError):
            socket_.send({"type": "cancel", "id": 1, "task_ids": ids})
            message = frame(b'{"type":"ping","x":"' + b"a" * (4 * MB) + b'"}')
            attacker.pour(socket_.connection, message, 60 * len(message))
        attacker.wait()


@attack(15)
def idle_sockets(attacker: Attacker) -> None:
    """1,000 sockets that do nothing."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 20_000), limit))
    sockets: list[WebSocket] = []
    with suppress(OSError):
        while len(sockets) < 1000 and attacker.left_s:
            sockets.append(WebSocket(attacker))
    attacker.wait()
    close_all(sockets)


@attack(5, short=True)
def foreign_origin(attacker: Attacker) -> None:
    """What a page of another origin can do in a visitor's browser."""
    with suppress(OSError), WebSocket(attacker, origin="https://evil.example"):
        attacker.findings.append("a page of another origin opens a socket")
    body = b'{"inputs":{"text":"a"}}'
    status, _ = attacker.call(
        attacker.post(PREDICT, body, origin="https://evil.example", content_type="text/plain")
    )
    if status < 400:
        attacker.findings.append(f"a page of another origin predicts (status {status})")
