"""What is asked of a target before it is measured."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from bench.targets import Broken, Dialect, Service, verify
from bench.workloads import WORKLOADS


@contextmanager
def serving(answer: Callable[[list[str]], object], status: int = 200) -> Iterator[Service]:
    """Run a server that answers texts as told."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            content = json.dumps(answer(json.loads(body)["texts"])).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield service(server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def service(port: int = 0, marker: str = '"batch_size":') -> Service:
    dialect = Dialect()
    return Service(port, dialect.path, dialect.body, dialect.outputs, marker, echoes=True)


def test_a_target_that_answers_rightly_is_measured():
    with serving(lambda texts: {"outputs": texts}) as service:
        verify(service, WORKLOADS["echo"])


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (lambda texts: {"outputs": texts[::-1]}, 200, "answered 3 rows wrongly"),
        (lambda texts: {"outputs": texts[:1]}, 200, "answered 3 rows wrongly"),
        (lambda texts: {"outputs": ["hello"]}, 200, "answered 1 rows wrongly"),
        (lambda texts: {"result": texts}, 200, "no answer to 1 rows: KeyError"),
        (lambda texts: {"detail": "busy"}, 503, "answered 1 rows with 503: .*busy"),
    ],
)
def test_a_target_that_answers_wrongly_is_refused(answer, status, reason):
    with serving(answer, status) as service, pytest.raises(Broken, match=reason):
        verify(service, WORKLOADS["echo"])


@pytest.mark.parametrize(
    ("answer", "size"),
    [
        (b'{"outputs": ["a"], "batch_size": 32}', 32),
        (b'{"batch_size":7,"outputs":["a"]}', 7),
        (b'{"outputs":["a"]}', None),
        (b'{"batch_size":null}', None),
    ],
)
def test_the_size_of_a_batch_is_found_in_an_answer(answer, size):
    assert service().batch_size(answer) == size
