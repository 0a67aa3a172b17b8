"""Plain predicts are answered the short way as Flask answers them, byte for byte.

The same bytes go to two gunicorn processes: one as it is deployed, and one without the short way,
so that Flask answers everything. Their answers may differ in ids and times only.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from inferno import names
from inferno.errors import ForwardFailed
from inferno.operate.ports import free_port
from inferno.settings import Settings
from inferno.testing.processes import process, wait_until
from tasks.broker.lanes import Lanes
from tasks.celery import app as celery_app
from tests.integration.web.conftest import PNG, FakeWorker
from tests.integration.web.server.guarded import REFUSED

PREDICT = "/v1/models/sentiment:predict"
GOOD = b'{"inputs": {"text": "Good."}}'
#: A task that the worker of these tests leaves alone.
UNANSWERED = b'{"inputs": {"text": "Good."}, "version": 1}'
#: A further request, whose answer ends the connection.
LAST = b"GET /health/live HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
#: Stands in a request for a letter that differs between the servers.
SIDE = b"%SIDE%"


class Case(NamedTuple):
    """Bytes that are sent on one connection."""

    name: str
    pieces: list[bytes]
    #: Whether the client ends its side instead of sending a last request.
    ends: bool = False


def ask(
    *headers: str,
    body: bytes = GOOD,
    path: str = PREDICT,
    method: str = "POST",
    version: str = "HTTP/1.1",
    host: str | None = "here",
    length: str | None = "",
) -> bytes:
    """Return a request; the length of its body is added unless another one is given."""
    lines = [f"{method} {path} {version}"]
    if host is not None:
        lines.append(f"Host: {host}")
    lines += headers
    if length is not None:
        lines.append(f"Content-Length: {length or len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def inputs(**values: object) -> bytes:
    return json.dumps({"inputs": values}).encode()


HEADERS = [
    [],
    ["User-Agent: curl/8.0"],
    ["User-Agent: "],
    ["Accept: */*"],
    ["Accept: image/png"],
    ["Accept: text/html;q=0.1"],
    ["Accept: a", "Accept: b"],
    ["Accept-Encoding: gzip, deflate, br"],
    ["Accept-Encoding: identity;q=0"],
    ["Accept-Language: de"],
    ["User-Agent: a", "Accept: */*", "Accept-Encoding: gzip", "Content-Type: application/json"],
    ["X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: there"],
    ["X-Forwarded-For: 192.0.2.1", "X-Forwarded-For: 192.0.2.2"],
    ["X-Forwarded-Port: 443", "X-Real-IP: 192.0.2.1"],
    ["Forwarded: for=192.0.2.1;proto=https"],
    ["Authorization: Bearer secret"],
    ["X-API-Key: secret"],
    ["Cookie: session=nonsense"],
    ["Origin: https://example.org"],
    ["Referer: https://example.org"],
    ["Sec-Fetch-Mode: cors"],
    ["traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"],
    ["X-Request-Id: 1"],
    ["X-HTTP-Method-Override: DELETE"],
    ["Script-Name: /v1"],
    ["Range: bytes=0-1"],
    ["If-None-Match: *"],
    ["If-Match: nothing"],
    ["Pragma: no-cache"],
    ["Cache-Control: no-cache"],
    ["Cache-Control: no-store"],
    ["Prefer: wait=5"],
    ["Prefer: nonsense"],
    ["Idempotency-Key: bare-%SIDE%"],
    ['Idempotency-Key: "quoted %SIDE%"'],
    ['Idempotency-Key: "open'],
    ["Inferno-Version: 2"],
    ["Inferno-Version: 0"],
    ["Inferno-Version: 999"],
    ["Inferno-Version: newest"],
    ["Inferno-Sticky-Key: user"],
    ["Expect: 100-continue"],
    ["Expect: nonsense"],
    ["Upgrade: websocket", "Connection: Upgrade"],
    ["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk"],
    ["Connection: close"],
    ["Connection: Close"],
    ["Connection: keep-alive"],
    ["Connection: Keep-Alive"],
    ["Connection: "],
    ["Connection: TE", "TE: trailers"],
    ["Connection: close, TE"],
    ["Connection: keep-alive, close"],
    ["Connection: keep-alive", "Connection: close"],
    ["Connection: close", "Connection: keep-alive"],
    ["Keep-Alive: timeout=5"],
    ["Content-Encoding: gzip"],
    ["Content-Encoding: identity"],
    ["Content-Language: en"],
    ["Content-Type: application/json"],
    ["Content-Type: application/JSON; charset=UTF-8"],
    ["Content-Type: application/json; charset=latin-1"],
    ["Content-Type: application/json;"],
    ["Content-Type: text/plain"],
    ["Content-Type: application/x-www-form-urlencoded"],
    ["Content-Type: multipart/form-data; boundary=x"],
    ["Content-Type: application/octet-stream"],
    ["Content-Type: image/png"],
    ["Content-Type: IMAGE/png"],
    ["Content-Type: application/vnd.api+json"],
    ["Content-Type: "],
    ["Content-Type: application/json", "Content-Type: application/json"],
    ["Host: again"],
    ["X-Long: " + 5000 * "x"],
    ["X-Longer: " + 9000 * "x"],
    [f"X-{number}: x" for number in range(120)],
    ["X_Under: x"],
    ["User_Agent: x"],
    ["X-Bytes: \xe4\xff"],
    ["User-Agent: \xe4\xff"],
    ["User-Agent: a\x00b"],
    ["User-Agent: a\rb"],
    ["User-Agent: a\nAccept: b"],
    ["User-Agent: a\r\n folded"],
    ["User-Agent : a"],
    [" User-Agent: a"],
    ["nonsense"],
    [": empty"],
    ["User-Agent:\ta\t"],
    ["CONTENT-type: application/json", "aCCEPT: */*"],
]

REQUESTS = {
    "no wait": ask("Prefer: wait=0", body=UNANSWERED),
    "asynchronous": ask("Prefer: respond-async", body=UNANSWERED),
    "no host": ask(host=None),
    "empty host": ask(host=""),
    "host with port": ask(host="here:8000"),
    "strange host": ask(host="a b/c"),
    "IPv6 host": ask(host="[::1]:80"),
    "root": ask(path="/models/sentiment:predict"),
    "/api/v1": ask(path="/api/v1/models/sentiment:predict"),
    "/v2": ask(path="/v2/models/sentiment:predict"),
    "query": ask(path=f"{PREDICT}?version=999"),
    "query of our own": ask(path=f"{PREDICT}?priority=3"),
    "harmless query": ask(path=f"{PREDICT}?a=b"),
    "empty query": ask(path=f"{PREDICT}?"),
    "fragment": ask(path=f"{PREDICT}#a"),
    "empty fragment": ask(path=f"{PREDICT}#"),
    "absolute form": ask(path=f"http://here{PREDICT}"),
    "asterisk": ask(path="*"),
    "no path": ask(path=""),
    "encoded name": ask(path="/v1/models/senti%6Dent:predict"),
    "encoded colon": ask(path="/v1/models/sentiment%3Apredict"),
    "encoded slash": ask(path="/v1/models%2Fsentiment:predict"),
    "bytes in the name": ask(path="/v1/models/s\xc3\xa4:predict"),
    "latin-1 in the name": ask(path="/v1/models/s\xe4:predict"),
    "space": ask(path="/v1/models/a b:predict"),
    "double slash": ask(path="//v1/models/sentiment:predict"),
    "double slash inside": ask(path="/v1//models/sentiment:predict"),
    "dots": ask(path="/v1/../v1/models/sentiment:predict"),
    "name of dots": ask(path="/v1/models/..:predict"),
    "slash at the end": ask(path=f"{PREDICT}/"),
    "parameter": ask(path=f"{PREDICT};a=b"),
    "two verbs": ask(path=f"{PREDICT}:predict"),
    "other verb": ask(path="/v1/models/sentiment:Predict"),
    "no name": ask(path="/v1/models/:predict"),
    "unknown model": ask(path="/v1/models/nothing:predict"),
    "broken model": ask(path="/v1/models/broken:predict"),
    "model that nobody serves": ask(path="/v1/models/tokens:predict", body=inputs(tokens=[[1]])),
    "failing model": ask(path="/v1/models/digits:predict", body=inputs(image=PNG)),
    "image that is none": ask(path="/v1/models/digits:predict", body=inputs(image="????")),
    "image itself": ask(
        "Content-Type: image/png",
        path="/v1/models/digits:predict",
        body=base64.b64decode(PNG),
    ),
    "GET": ask(method="GET"),
    "GET without body": ask(method="GET", body=b"", length=None),
    "PUT": ask(method="PUT"),
    "OPTIONS": ask(method="OPTIONS"),
    "post": ask(method="post"),
    "POSTS": ask(method="POSTS"),
    "HTTP/1.0": ask(version="HTTP/1.0"),
    "HTTP/1.0 kept alive": ask("Connection: keep-alive", version="HTTP/1.0"),
    "HTTP/1.2": ask(version="HTTP/1.2"),
    "HTTP/2.0": ask(version="HTTP/2.0"),
    "http/1.1": ask(version="http/1.1"),
    "no version": ask(version=""),
    "two lengths": ask(f"Content-Length: {len(GOOD)}"),
    "two different lengths": ask("Content-Length: 1"),
    "signed length": ask(length=f"+{len(GOOD)}"),
    "negative length": ask(length="-1"),
    "hexadecimal length": ask(length="0x1d"),
    "length of superscripts": ask(length="\xb2"),
    "length with zeros": ask(length=f"000{len(GOOD)}"),
    "length with spaces": ask(length=f"  {len(GOOD)}  "),
    "list of lengths": ask(length=f"{len(GOOD)}, {len(GOOD)}"),
    "length of many digits": ask(length="1" * 5000),
    "no length": ask(length=None, body=b""),
    "no body": ask(length="0", body=b""),
    "chunked": ask("Transfer-Encoding: chunked", length=None, body=b"1d\r\n%b\r\n0\r\n\r\n" % GOOD),
    "chunked with extension": ask(
        "Transfer-Encoding: chunked", length=None, body=b"1d;a=b\r\n%b\r\n0\r\n\r\n" % GOOD
    ),
    "chunked with trailer": ask(
        "Transfer-Encoding: chunked", length=None, body=b"1d\r\n%b\r\n0\r\nA: b\r\n\r\n" % GOOD
    ),
    "chunked and a length": ask("Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "identity": ask("Transfer-Encoding: identity"),
    "gzip": ask("Transfer-Encoding: gzip"),
}

BODIES = {
    "instances": b'{"instances": ["Good.", "Bad."]}',
    "instances of objects": b'{"instances": [{"text": "Good."}]}',
    "instances and inputs": b'{"instances": ["a"], "inputs": {"text": "a"}}',
    "no inputs": b"{}",
    "empty inputs": b'{"inputs": {}}',
    "not JSON": b"nonsense",
    "white space": b"   ",
    "list": b"[]",
    "null": b"null",
    "open": b'{"inputs": {"text": "Good."}',
    "more behind": GOOD + b"more",
    "space around": b" \r\n" + GOOD + b"\r\n\r\n",
    "two objects": GOOD + GOOD,
    "mark of byte order": b"\xef\xbb\xbf" + GOOD,
    "not UTF-8": b'{"inputs": {"text": "\xff"}}',
    "zero byte": b'{"inputs": {"text": "a\x00"}}',
    "escaped surrogate": b'{"inputs": {"text": "\\ud800"}}',
    "not a number": b'{"inputs": {"text": NaN}}',
    "same name twice": b'{"inputs": {"text": "a"}, "inputs": {"text": "b"}}',
    "number": b'{"inputs": {"text": 5}}',
    "list of texts": b'{"inputs": {"text": ["a", "b", "c"]}}',
    "nested": b'{"inputs": {"text": [["a"]]}}',
    "deeply nested": b'{"inputs": {"text": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
    "other input": b'{"inputs": {"other": "a"}}',
    "member that is unknown": b'{"inputs": {"text": "a"}, "unknown": 1}',
    "model in the body": b'{"inputs": {"text": "a"}, "model": "digits"}',
    "version": b'{"inputs": {"text": "a"}, "version": 2}',
    "version that is unknown": b'{"inputs": {"text": "a"}, "version": 99}',
    "version as text": b'{"inputs": {"text": "a"}, "version": "2"}',
    "outputs": b'{"inputs": {"text": "a"}, "outputs": ["scores"]}',
    "outputs that are unknown": b'{"inputs": {"text": "a"}, "outputs": ["other"]}',
    "priority": b'{"inputs": {"text": "a"}, "priority": 99}',
    "no time": b'{"inputs": {"text": "a"}, "timeout_ms": -1}',
    "codec": b'{"inputs": {"text": "a"}, "codec": "nonsense"}',
    "codec base64": b'{"inputs": {"text": "a"}, "codec": "base64"}',
    "no cache": b'{"inputs": {"text": "a"}, "cache": false}',
    "webhook": b'{"inputs": {"text": "a"}, "webhook": "http://127.0.0.1/"}',
    "names of others": b'{"inputs": {"text": "a"}, "version": 1, "model_id": "a"}',
    "long text": inputs(text="x" * 30_000),
    "too long text": inputs(text="x" * 60_000),
    "too large": inputs(text="x" * 120_000),
    "many rows": inputs(text=["x"] * 2000),
    "unanswered": UNANSWERED,
}

CONNECTIONS = [
    Case("two requests", [ask(), ask()]),
    Case("two requests at once", [ask() + ask()]),
    Case("error between", [ask() + ask(body=b"{") + ask()]),
    Case("other request between", [ask(), LAST.replace(b"close", b"keep-alive"), ask()]),
    Case("Flask's request first", [ask("Prefer: wait=5"), ask(), ask("X-API-Key: a"), ask()]),
    Case("request after close", [ask("Connection: close"), ask()]),
    Case("head in pieces", [ask()[:30], ask()[30:]]),
    Case("head in three pieces", [ask()[:5], ask()[5:60], ask()[60:]]),
    Case("end of the head in pieces", [ask()[: -len(GOOD) - 2], ask()[-len(GOOD) - 2 :]]),
    Case("body in pieces", [ask()[:-20], ask()[-20:-10], ask()[-10:]]),
    Case("body in pieces with the next request", [ask()[:-20], ask()[-20:] + ask()]),
    Case("long body in pieces", [(long := ask(body=inputs(text="x" * 49_000)))[:-9], long[-9:]]),
    Case("empty lines before", [b"\r\n\r\n" + ask()]),
    Case("empty line between", [ask() + b"\r\n" + ask()]),
    Case("bytes behind the body", [ask() + b"nonsense"]),
    Case("line feeds", [ask().replace(b"\r\n", b"\n")]),
    Case("line feeds in the head", [ask("Accept: a").replace(b"here\r\n", b"here\n")]),
    Case("line feeds at the end of the head", [ask().replace(b"\r\n\r\n", b"\n\n")]),
    Case("carriage returns", [ask().replace(b"\r\n", b"\r")], ends=True),
    Case("body ends early", [ask(length="100")], ends=True),
    Case("body ends early in its JSON", [ask()[:-5]], ends=True),
    Case("body never begins", [ask()[: -len(GOOD)]], ends=True),
    Case("head ends early", [ask()[:40]], ends=True),
    Case(
        "chunked nonsense",
        [ask("Transfer-Encoding: chunked", length=None, body=b"nonsense\r\n")],
        ends=True,
    ),
    Case("nothing", [], ends=True),
    Case("not HTTP", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"], ends=True),
]

CASES = [
    *(Case(f"{headers[:2]!r:.80}", [ask(*headers)]) for headers in HEADERS),
    *(Case(name, [request]) for name, request in REQUESTS.items()),
    *(Case(name, [ask(body=body)]) for name, body in BODIES.items()),
    *CONNECTIONS,
]


@contextmanager
def gunicorn(env: dict[str, str], log: Path, app: str, *options: str) -> Iterator[int]:
    """Run one web process; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--config", "web/gunicorn_conf.py"]
    env = env | {"INFERNO_SERVER__PORT": str(port), "INFERNO_SERVER__PROCESSES": "1"}

    def answers() -> bool:
        try:
            return exchange(port, [LAST]).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    with process([*command, *options, app], env, log) as popen:
        wait_until(lambda: answers() or popen.poll() is not None)
        assert popen.poll() is None, log.read_text()
        yield port


@pytest.fixture(scope="module")
def env(redis_url, repository):
    return {
        "INFERNO_REDIS__URL": redis_url,
        "INFERNO_REPOSITORY__ROOT": str(repository),
        "INFERNO_SERVER__SYNC_WAIT_MS": "2000",
        # The name in these requests.
        "INFERNO_SERVER__HOSTS": "here",
        "INFERNO_LIMITS__MAX_BODY_BYTES": "100000",
        "INFERNO_LIMITS__MAX_TEXT_BYTES": "50000",
        # The order of methods in `Allow` is that of a set.
        "PYTHONHASHSEED": "0",
    }


@contextmanager
def both(env: dict[str, str], folder: Path, app: str) -> Iterator[tuple[int, int]]:
    """Run an app with the short way and without; yields their ports."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        own = gunicorn(env, folder / "own.log", app)
        worker = "tests.integration.web.server.flask_only.FlaskOnly"
        plain = gunicorn(env, folder / "plain.log", app, "--worker-class", worker)
        short, flask = pool.map(stack.enter_context, (own, plain))
        yield short, flask


@pytest.fixture(scope="module")
def ports(env, tmp_path_factory, settled):
    with both(env, tmp_path_factory.mktemp("web"), "web.app:create_app()") as ports:
        yield ports


@pytest.fixture(scope="module")
def settled(redis_url, settings: Settings, broker):
    """A worker that settles each task of these processes as soon as it is in its lane."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        worker = FakeWorker(client, settings)
        lanes = Lanes(celery_app, client, settings)
        over = threading.Event()
        thread = threading.Thread(target=settle, args=(worker, lanes, over))
        thread.start()
        yield
        over.set()
        thread.join()


def settle(worker: FakeWorker, lanes: Lanes, over: threading.Event) -> None:
    # Every task of these tests has the default priority.
    streams: dict[Any, Any] = {f"{lanes.key(model)}:0": "0" for model in ("sentiment", "digits")}
    known: set[str] = set()
    while not over.is_set():
        # Reports go stale.
        worker.serve(sentiment=[1, 2], digits=[1])
        arrived: Any = worker.client.xread(streams, block=50)
        for stream, entries in arrived:
            streams[stream.decode()] = entries[-1][0]
        index: Any = worker.client.zrange(names.index_key("inferno:"), 0, -1)
        fresh = {task_id.decode() for task_id in index} - known
        known |= fresh
        for task_id in fresh:
            record, _ = worker.records.fetch(task_id)
            assert record is not None
            if record.model == "digits":
                worker.fail(task_id, ForwardFailed("it broke"), model="digits")
            elif record.version == 2:
                worker.succeed(task_id)


def exchange(port: int, pieces: list[bytes], ends: bool = True) -> bytes:
    """Send pieces, each once the server has had the time to see the one before; return all."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number, piece in enumerate(pieces):
            if number:
                # A later connection is answered after the server has looked at this one.
                exchange(port, [LAST])
            sock.sendall(piece)
        if ends:
            sock.shutdown(socket.SHUT_WR)
        received = bytearray()
        try:
            while chunk := sock.recv(65_536):
                received += chunk
        except ConnectionResetError:
            pass  # The server has closed the connection without reading everything.
        return bytes(received)


MASKED = [
    (re.compile(rb"Date: [^\r]*"), b"Date: -"),
    (re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}"), b"<task>"),
    (re.compile(rb"\d{4}-\d\d-\d\dT[\d:.]+\+00:00"), b"<time>"),
]


def masked(answers: bytes) -> bytes:
    for pattern, mask in MASKED:
        answers = pattern.sub(mask, answers)
    return answers


def ask_both(ports: tuple[int, int], case: Case) -> tuple[bytes, bytes]:
    """Return what the servers answer, but for ids and times."""

    def one(port: int, side: bytes) -> bytes:
        pieces = [piece.replace(SIDE, side) for piece in case.pieces]
        if not case.ends:
            pieces = [*pieces[:-1], pieces[-1] + LAST]
        return masked(exchange(port, pieces, case.ends))

    with ThreadPoolExecutor(2) as pool:
        short, flask = pool.map(one, ports, (b"a", b"b"))
    return short, flask


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_ways_answer_alike(ports, case):
    short, flask = ask_both(ports, case)
    assert short == flask


def test_a_succeeding_predict_is_among_them(ports):
    short, _ = ask_both(ports, Case("good", [ask()]))
    assert short.count(b"HTTP/1.1 200 OK") == 2
    assert b'"outputs":' in short


@pytest.fixture(scope="module")
def guarded(env, tmp_path_factory, settled):
    app = "tests.integration.web.server.guarded:create()"
    with both(env, tmp_path_factory.mktemp("guarded"), app) as ports:
        yield ports


@pytest.mark.parametrize(
    "case",
    [
        Case("refused", [ask(f"User-Agent: {REFUSED}")]),
        Case("refused twice", [ask(f"User-Agent: {REFUSED}") * 2]),
        Case("refused after an answer", [ask(), ask(f"User-Agent: {REFUSED}"), ask()]),
        Case("refused before an answer", [ask(f"User-Agent: {REFUSED}"), ask()]),
        Case("refused and closed", [ask(f"User-Agent: {REFUSED}", "Connection: close")]),
        Case("refused by Flask", [ask(f"User-Agent: {REFUSED}", "X-API-Key: a"), ask()]),
        Case("refused with a wrong body", [ask(f"User-Agent: {REFUSED}", body=b"{"), ask()]),
        Case(
            "refused on gunicorn's reading", [ask("Prefer: wait=5"), ask(f"User-Agent: {REFUSED}")]
        ),
        Case(
            "refused for another protocol",
            [ask(f"User-Agent: {REFUSED}", path="/v2/models/sentiment/infer")],
        ),
    ],
    ids=lambda case: case.name,
)
def test_a_refusal_is_answered_alike(guarded, case):
    short, flask = ask_both(guarded, case)
    assert short == flask
    assert b"HTTP/1.1 429 " in short
    assert b"Retry-After: 7\r\n" in short


def test_a_call_is_refused_before_its_body_is_read(guarded):
    request = ask(f"User-Agent: {REFUSED}")
    for port in guarded:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.sendall(request[: -len(GOOD)])
            assert sock.recv(65_536).startswith(b"HTTP/1.1 429 ")


def test_sockets_are_refused(guarded):
    request = (
        b"GET /ws HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    refused = request + f"User-Agent: {REFUSED}\r\n\r\n".encode()
    for port in guarded:
        assert exchange(port, [refused]).startswith(b"HTTP/1.1 429 ")


def test_foreign_hosts_are_refused_on_both_ways(ports):
    short, flask = ask_both(ports, Case("foreign host", [ask(host="evil.example")]))
    assert short == flask
    assert short.startswith(b"HTTP/1.1 421 ")
