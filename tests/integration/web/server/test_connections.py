"""Clients that are slow, greedy or many, beside one that behaves."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from inferno.testing.processes import wait_until, web
from tests.integration.web.server.test_process import environment

LIVE = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
POST = b"POST /v1/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@contextmanager
def served(redis_url: str, repository: Path, folder: Path, **server: object) -> Iterator[str]:
    env = environment(redis_url, repository)
    env |= {f"INFERNO_SERVER__{name}".upper(): str(value) for name, value in server.items()}
    with web(env, folder / "web.log") as address:
        yield address


@pytest.fixture(scope="module")
def address(redis_url, repository, tmp_path_factory):
    """A server that loses its patience soon."""
    with served(
        redis_url,
        repository,
        tmp_path_factory.mktemp("web"),
        connections_per_address=20,
        max_held_bytes=3_000_000,
        idle_timeout_s=2,
        head_timeout_s=1,
        stall_timeout_s=1,
        min_bytes_per_s=100_000,
    ) as address:
        yield address


def connect(address: str) -> socket.socket:
    host, _, port = address.partition(":")
    sock = socket.create_connection((host, int(port)), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def answer(sock: socket.socket) -> bytes:
    """Return all that comes until the server ends the connection."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while chunk := sock.recv(65_536):
            received += chunk
    return bytes(received)


def trickle(sock: socket.socket, pause_s: float = 0.1) -> bytes:
    """Send a byte from time to time, until the server answers; return the answer."""
    sock.settimeout(pause_s)
    while True:
        try:
            received = sock.recv(65_536)
        except TimeoutError:
            with suppress(OSError):
                sock.sendall(b"a")
        else:
            sock.settimeout(10)
            return received + answer(sock)


def test_a_client_with_requests_always_ready_leaves_the_others_their_turn(address):
    over = threading.Event()

    def flood(sock: socket.socket) -> None:
        with suppress(OSError):
            while not over.is_set():
                sock.sendall(LIVE * 500)

    with connect(address) as sock, httpx.Client(base_url=f"http://{address}") as client:
        threads = [
            threading.Thread(target=flood, args=(sock,)),
            threading.Thread(target=answer, args=(sock,)),
        ]
        for thread in threads:
            thread.start()
        answers = [client.get("/health/live").status_code for _ in range(20)]
        over.set()
        sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
    assert answers == [200] * 20


@pytest.mark.parametrize("start", [b"1;", b"0\r\nX: ", b"0\r\n" + b"X: a\r\n" * 2000])
def test_chunk_extensions_and_trailers_have_an_end(address, start):
    with connect(address) as sock:
        with suppress(OSError):
            sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + start)
            for _ in range(200):
                sock.sendall(b"a" * 65_536)
        assert answer(sock).startswith(b"HTTP/1.1 400 ")


def test_a_body_of_tiny_chunks_has_an_end(address):
    with connect(address) as sock:
        with suppress(OSError):
            sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            sock.sendall(b"1\r\na\r\n" * 200_000)
        assert answer(sock).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"POST",
        POST,
        POST + b"Content-Length: 1000\r\n\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n{",
        POST.replace(b"infer", b"models/sentiment:predict") + b"Content-Length: 1000\r\n\r\n{",
    ],
)
@pytest.mark.parametrize("wait", [answer, trickle], ids=["silent", "trickling"])
def test_a_slow_request_times_out(address, sent, wait):
    with connect(address) as sock:
        sock.sendall(sent)
        assert wait(sock).startswith(b"HTTP/1.1 408 ")


def test_a_connection_without_a_request_is_closed(address):
    with connect(address) as sock:
        sock.sendall(LIVE)
        received = answer(sock)
        assert received.startswith(b"HTTP/1.1 200 ")
        assert received.count(b"HTTP/1.1") == 1


def test_a_body_that_ends_early_is_not_run(address, worker):
    body = b'{"inputs": {"text": "Good."}}'
    for path in ("/v1/models/sentiment:predict", "/v1/models/sentiment:predict?a=b"):
        with connect(address) as sock:
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            length = f"Content-Length: {len(body) + 1}\r\n\r\n"
            sock.sendall((head + length).encode() + body)
            sock.shutdown(socket.SHUT_WR)
            assert answer(sock).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("sent", [b"", b"GET", POST + b"Content-Length: 9\r\n\r\n{"])
def test_slow_connections_make_room_for_new_ones(address, sent):
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(address)) for _ in range(20)]
        for sock in slow:
            sock.sendall(sent)
        for _ in range(30):
            with connect(address) as sock:
                sock.sendall(LIVE)
                assert sock.recv(65_536).startswith(b"HTTP/1.1 200 ")
        # The first ones had to go.
        assert answer(slow[0])[:13] in (b"", b"HTTP/1.1 408 ")


def test_unfinished_bodies_make_room_for_whole_ones(address):
    with ExitStack() as stack:
        for _ in range(10):
            sock = stack.enter_context(connect(address))
            with suppress(OSError):
                sock.sendall(POST + b"Content-Length: 1000001\r\n\r\n" + b"a" * 1_000_000)
        response = httpx.post(f"http://{address}/v1/infer", content=b"b" * 1_000_000)
        assert response.status_code == 400


def complete(seconds: int, size: int = 0) -> tuple[bytes, bytes]:
    """Return head and body of a task that nobody runs, for a client that waits."""
    body = b'{"model": "sentiment", "inputs": {"text": "Good."}, "version": 1}'.ljust(size)
    return POST + b"Prefer: wait=%d\r\nContent-Length: %d\r\n\r\n" % (seconds, len(body)), body


def test_a_complete_request_may_take_its_time(address):
    with connect(address) as sock:
        # The body comes after Flask has begun.
        head, body = complete(3)
        sock.sendall(head)
        assert httpx.get(f"http://{address}/health/live").status_code == 200
        sock.sendall(body + LIVE)
        received = answer(sock)
    assert re.findall(rb"HTTP/1.1 (\d+) ", received) == [b"202", b"200"]


def test_large_requests_leave_room_for_small_ones(address):
    with ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(connect(address))
            sock.sendall(b"".join(complete(4, 999_997)))
        small = {"model": "sentiment", "inputs": {"text": "Good."}, "version": 1}
        statuses = [httpx.post(f"http://{address}/v1/infer", json=small).status_code]
        statuses += [httpx.post(f"http://{address}/v1/infer", content=b" " * 900_000).status_code]
    assert statuses == [202, 503]


def test_clients_that_have_left_make_room(address, worker):
    with ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(connect(address))
            sock.sendall(b"".join(complete(30)))
            sock.shutdown(socket.SHUT_WR)
        for _ in range(5):
            with connect(address) as sock:
                sock.sendall(LIVE)
                assert sock.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_memory_goes_back(redis_url, repository, tmp_path):
    with served(redis_url, repository, tmp_path) as address, ExitStack() as stack:
        httpx.get(f"http://{address}/health/live")
        process = server_process(address)
        before = process.memory_info().rss
        socks = [stack.enter_context(connect(address)) for _ in range(10)]
        for sock in socks:
            sock.sendall(POST + b"Content-Length: 10000001\r\n\r\n" + b"a" * 10_000_000)
        wait_until(lambda: process.memory_info().rss > before + 80_000_000)
        stack.close()
        wait_until(lambda: process.memory_info().rss < before + 20_000_000)


def test_an_unread_answer_is_given_up(redis_url, repository, tmp_path, worker, store, until):
    with served(
        redis_url, repository, tmp_path, stall_timeout_s=1, min_bytes_per_s=1_000_000
    ) as address:
        task_id = httpx.post(
            f"http://{address}/infer", json={"model": "sentiment", "inputs": {"text": "Good."}}
        ).json()["task_id"]
        text = "0123456789" * 2_000_000
        worker.succeed(task_id, {"text": {"dtype": "string", "shape": [1], "data": [text]}})
        with connect(address) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(f"GET /tasks/{task_id} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            assert sock.recv(12) == b"HTTP/1.1 200"
            sockets = server_process(address)
            wait_until(lambda: not established(sockets))


def test_idle_connections_do_not_delay_the_end(redis_url, repository, tmp_path):
    with served(redis_url, repository, tmp_path) as address, connect(address) as sock:
        sock.sendall(LIVE)
        assert sock.recv(65_536).startswith(b"HTTP/1.1 200 ")
        process = server_process(address)
        process.parent().terminate()
        process.wait(10)


def server_process(address: str) -> psutil.Process:
    """Return the gunicorn worker that listens on an address, as its parent does."""
    port = int(address.rpartition(":")[2])
    listening = [
        process
        for process in psutil.Process().children(recursive=True)
        if any(held.laddr.port == port for held in process.net_connections("tcp"))
    ]
    (worker,) = (process for process in listening if process.parent() in listening)
    return worker


def established(process: psutil.Process) -> list[object]:
    """Return the connections of clients."""
    (port,) = {
        held.laddr.port
        for held in process.net_connections("tcp")
        if held.status == psutil.CONN_LISTEN
    }
    return [
        held
        for held in process.net_connections("tcp")
        if held.status == psutil.CONN_ESTABLISHED and held.laddr.port == port
    ]
