"""The web process as it is deployed: gunicorn with gevent, and nothing that could run a model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.client import HTTPResponse

import httpx
import pytest
import websocket

from inferno import names

NATIVE = {"model": "sentiment", "inputs": {"text": "Good."}}


def test_web_process_imports_nothing_that_runs_models(redis_url, repository):
    code = (
        "import sys; from web.app import create_app; create_app();"
        "print([m for m in ('torch', 'onnxruntime', 'celery_batches', 'inferno.engine',"
        " 'inferno.runtimes') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(redis_url, repository),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def environment(redis_url, repository):
    return os.environ | {
        "INFERNO_REDIS__URL": redis_url,
        "INFERNO_REPOSITORY__ROOT": str(repository),
        "INFERNO_SERVER__PROCESSES": "1",
        # The names in requests of these tests.
        "INFERNO_SERVER__HOSTS": "here,a,b",
    }


@pytest.fixture(scope="module")
def server(redis_url, repository, until):
    """The address of gunicorn, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--config", "web/gunicorn_conf.py"]
    process = subprocess.Popen(
        [*command, "web.app:create_app()"],
        env=environment(redis_url, repository) | {"INFERNO_SERVER__PORT": str(port)},
    )
    try:
        until(lambda: _lives(f"http://127.0.0.1:{port}"), 30)
        yield f"127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(30)


def _lives(url):
    try:
        return httpx.get(f"{url}/health/live").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def address(server, worker):
    return server[0]


def test_two_hundred_synchronous_calls_share_one_process(address, worker, store, until):
    answers = []

    def call(client):
        path = f"http://{address}/v1/models/sentiment:predict"
        response = client.post(path, json={"inputs": {"text": "Good."}}, timeout=30)
        answers.append((response.status_code, response.json()["outputs"]))

    limits = httpx.Limits(max_connections=None)
    with httpx.Client(limits=limits) as client:
        threads = [threading.Thread(target=call, args=(client,)) for _ in range(200)]
        for thread in threads:
            thread.start()
        submitted = until(lambda: all_submitted(store, 200), 30)
        assert len([c for c in store.client_list() if c["name"] == "inferno-web"]) == 1
        for task_id in submitted:
            worker.succeed(task_id.decode())
        for thread in threads:
            thread.join(30)
    assert [status for status, _ in answers] == [200] * 200


def all_submitted(store, count):
    tasks = store.zrange(names.index_key("inferno:"), 0, -1)
    return tasks if len(tasks) == count else None


def test_large_results_arrive_whole(address, worker):
    task_id = httpx.post(f"http://{address}/infer", json=NATIVE).json()["task_id"]
    text = "0123456789" * 500_000
    worker.succeed(task_id, {"text": {"dtype": "string", "shape": [1], "data": [text]}})
    ws = websocket.create_connection(f"ws://{address}/ws", timeout=20, skip_utf8_validation=True)
    ws.send(json.dumps({"type": "subscribe", "task_id": task_id}))
    assert json.loads(ws.recv())["data"]["outputs"]["text"]["data"] == [text]
    ws.close()


def request(text: str, *headers: str) -> bytes:
    body = json.dumps({"inputs": {"text": text}}).encode()
    lines = ("POST /v1/models/sentiment:predict HTTP/1.1", "Host: here", *headers)
    head = "".join(f"{line}\r\n" for line in (*lines, f"Content-Length: {len(body)}"))
    return head.encode() + b"\r\n" + body


def say(address, pieces, worker, store, until, count):
    """Send pieces over one connection, let its tasks succeed, and return the answers."""
    host, port = address.split(":")
    known = set(store.zrange(names.index_key("inferno:"), 0, -1))

    def fresh():
        return set(store.zrange(names.index_key("inferno:"), 0, -1)) - known

    with socket.create_connection((host, int(port)), timeout=20) as sock:
        for piece in pieces:
            sock.sendall(piece)
        answers = []
        for _ in range(count):
            submitted = until(fresh)
            for task_id in submitted:
                worker.succeed(task_id.decode())
            known |= submitted
            answer = HTTPResponse(sock)
            answer.begin()
            answers.append((answer, json.loads(answer.read())))
        # What has not been asked for would come now.
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    return answers


@pytest.mark.parametrize(
    "pieces",
    [
        [request("one") + request("two")],
        [request("one"), request("two")],
        [request("one")[:20], request("one")[20:], request("two")],
        [request("one")[:-20], request("one")[-20:] + request("two")],
        [request("one", "X-Long: " + 5000 * "x"), request("two")],
    ],
    ids=["together", "one by one", "head in pieces", "body in pieces", "long head"],
)
def test_each_request_of_a_connection_gets_its_answer_in_turn(
    address, worker, store, until, pieces
):
    answers = say(address, pieces, worker, store, until, 2)

    assert [answer.status for answer, _ in answers] == [200, 200]
    assert len({document["task_id"] for _, document in answers}) == 2
    assert all(answer.getheader("Connection") == "keep-alive" for answer, _ in answers)


def test_a_connection_may_ask_for_other_things_between(address, worker, store, until):
    with httpx.Client(base_url=f"http://{address}") as client:
        path = "/v1/models/sentiment:predict"
        wrong = client.post(path, json={"inputs": {"text": 5}})
        assert (wrong.status_code, wrong.json()["field"]) == (422, "inputs.text")
        assert client.get("/health/live").status_code == 200
        task = client.post("/infer", json=NATIVE).json()
        worker.succeed(task["task_id"])
        waited = client.post(path, json={"inputs": {"text": "Good."}}, headers={"Prefer": "wait=0"})
        assert waited.status_code == 202


@pytest.mark.parametrize("body", [b'{"inputs": {"text": 5}}', b'{\r\n\r\n"inputs": {"text": 5}}'])
def test_a_head_of_bare_line_feeds_ends_where_gunicorn_says(address, worker, body):
    head = b"POST /v1/models/sentiment:predict HTTP/1.1\nHost: a\nContent-Length: %d\n\n" % len(
        body
    )
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(head + body + b"GET /health/live HTTP/1.1\r\nHost: b\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        answers = b""
        while chunk := sock.recv(65536):
            answers += chunk
    statuses = re.findall(rb"HTTP/1.1 (\d+)", answers)
    # Its parser in Python refuses such heads.
    assert statuses in ([b"422", b"200"], [b"400"])


def test_names_in_a_path_may_be_encoded(address, worker):
    path = f"http://{address}/v1/models/senti%6Dent:predict"
    assert httpx.post(path, json={"inputs": {"text": 5}}).status_code == 422


def test_a_client_that_wants_the_connection_closed_gets_that(address, worker, store, until):
    ((answer, document),) = say(
        address, [request("one", "Connection: close")], worker, store, until, 1
    )

    assert answer.status == 200
    assert answer.getheader("Connection") == "close"
    assert document["model"] == "sentiment"


def test_connection_survives_a_body_that_was_refused(address):
    with httpx.Client(base_url=f"http://{address}") as client:
        assert client.post("/infer", content=b"x" * 13_000_000).status_code == 413
        assert client.get("/health/live").status_code == 200


def test_stopping_closes_sockets_and_ends_at_once(server, address):
    ws = websocket.create_connection(f"ws://{address}/ws", timeout=20)
    ws.send('{"type": "ping"}')
    assert json.loads(ws.recv()) == {"type": "pong"}
    process = server[1]
    process.send_signal(signal.SIGTERM)
    opcode, frame = ws.recv_data()
    assert opcode == websocket.ABNF.OPCODE_CLOSE
    assert int.from_bytes(frame[:2], "big") == 1001
    ws.shutdown()
    assert process.wait(15) == 0
