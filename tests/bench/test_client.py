"""The load generator's own HTTP and WebSocket, against what servers may send."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from bench.client import Http, ProtocolError, WebSocket, get, post

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def against(handler: Handler, client: Callable[[int], Awaitable[object]]) -> object:
    """Run a client against a server that does as told."""

    handling: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handling.add(task)
        await handler(reader, writer)
        writer.close()
        await writer.wait_closed()

    async def run() -> object:
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            try:
                return await client(server.sockets[0].getsockname()[1])
            finally:
                await asyncio.gather(*handling)

    return asyncio.run(run())


def sending(*parts: bytes) -> Handler:
    """Answer whatever comes with bytes, in separate packets, then hang up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return handle


async def call(port: int) -> tuple[int, bytes]:
    connection = await Http.connect(port)
    try:
        return await connection.call(get("/"))
    finally:
        connection.close()


def test_an_answer_may_come_in_pieces():
    parts = b"HTTP/1.1 200 OK\r\ncontent-", b"length: 5\r\nx: y\r\n\r", b"\nhel", b"lo"
    assert against(sending(*parts), call) == (200, b"hello")


def test_an_answer_may_come_in_chunks():
    parts = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n",
        b"2\r\nlo\r\n0\r\n\r\n",
    )
    assert against(sending(*parts), call) == (200, b"hello")


def test_two_answers_on_one_connection_are_kept_apart():
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in (b"1", b"2"):
            await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(4)
            writer.write(b"HTTP/1.1 201 OK\r\nContent-Length: 5\r\n\r\n" + body + number)

    async def twice(port: int) -> object:
        connection = await Http.connect(port)
        try:
            return [await connection.call(post("/", body)) for body in (b"aaaa", b"bbbb")]
        finally:
            connection.close()

    assert against(handle, twice) == [(201, b"aaaa1"), (201, b"bbbb2")]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "without a length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "closed the connection"),
        (b"", "closed the connection"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(answer, reason):
    with pytest.raises(ProtocolError, match=reason):
        against(sending(answer), call)


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


async def receive(port: int) -> list[bytes]:
    socket = await WebSocket.connect(port, "/ws")
    messages = []
    try:
        while True:
            messages.append(await socket.receive())
    except ProtocolError:
        return messages
    finally:
        socket.close()


def test_messages_of_every_length_are_received():
    long, longest = b"l" * 300, b"m" * 70_000
    frames = [
        b"\x81\x05hello",
        b"\x81\x7e" + len(long).to_bytes(2) + long,
        b"\x81\x7f" + len(longest).to_bytes(8) + longest,
    ]
    assert against(sending(SWITCH, *frames, b"\x88\x00"), receive) == [b"hello", long, longest]


def test_a_frame_that_comes_byte_by_byte_is_one_message():
    frame = b"\x81\x7e\x01\x00" + b"x" * 256
    parts = [frame[at : at + 1] for at in range(len(frame))]
    assert against(sending(SWITCH, *parts), receive) == [b"x" * 256]


def test_a_ping_is_answered():
    answered: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCH + b"\x89\x02hi")
        # A client's frames are masked, here with zeros.
        answered.append(await reader.readexactly(8))

    assert against(handle, receive) == []
    assert answered == [b"\x8a\x82\x00\x00\x00\x00hi"]


def test_a_server_that_knows_no_websockets_is_an_error():
    with pytest.raises(ProtocolError, match="404"):
        against(sending(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), receive)
