"""Callers that hang up while they wait."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from werkzeug.serving import make_server

from inferno import names
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import web
from tasks.results.bridge import Waiter
from web.calls import disconnect
from web.calls.disconnect import has_hung_up

NATIVE = {"model": "sentiment", "inputs": {"text": "Good."}}


@pytest.fixture(autouse=True)
def nobody_waits(store, until):
    """The server leaves the channels of an earlier test a moment after that."""
    until(lambda: not awaited(store))


@pytest.fixture
def pair():
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_silence_and_pipelined_bytes_are_no_disconnect(pair, timeout):
    near, far = pair
    near.settimeout(timeout)
    assert not has_hung_up(near)
    far.send(b"GET / HTTP/1.1")
    assert not has_hung_up(near)
    assert near.recv(100) == b"GET / HTTP/1.1"
    assert near.gettimeout() == timeout


def test_end_of_stream_is_a_disconnect(pair):
    near, far = pair
    far.close()
    assert has_hung_up(near)
    assert has_hung_up(near), "the end of the stream is not used up"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("web") / "web.log"
    path.touch()
    return path


@pytest.fixture(scope="module")
def gunicorn(redis_url, repository, log):
    env = {
        "INFERNO_REDIS__URL": redis_url,
        "INFERNO_REPOSITORY__ROOT": str(repository),
        "INFERNO_TASKS__CANCEL_ON_DISCONNECT": "true",
    }
    with web(env, log) as address:
        yield address


@pytest.fixture
def werkzeug(settings, app):
    tasks = settings.tasks.model_copy(update={"cancel_on_disconnect": True})
    object.__setattr__(
        app.extensions["inferno"].gateway, "settings", settings.model_copy(update={"tasks": tasks})
    )
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["gunicorn", "werkzeug"])
def address(request):
    found = request.getfixturevalue(request.param)
    # Afterwards: its report is only believed for some seconds.
    request.getfixturevalue("worker")
    return found


def call(address, path, body, **headers):
    """Send a request and leave its answer unread."""
    host, _, port = address.partition(":")
    sock = socket.create_connection((host, int(port)), timeout=30)
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {address}", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    sock.sendall("\r\n".join([*lines, "", ""]).encode() + content)
    return sock


def awaited(store):
    """Return the task that somebody waits for."""
    channels = store.pubsub_channels(names.result_key("*"))
    return channels[0].decode().removeprefix(names.result_key("")) if channels else None


def submitted(store):
    """Return the newest task."""
    newest = store.zrevrange(names.index_key("inferno:"), 0, 0)
    return newest[0].decode() if newest else None


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/v1/models/sentiment:predict", {"inputs": {"text": "Good."}}, {}),
        (
            "/v2/models/sentiment/infer",
            {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["Good."]}]},
            {},
        ),
        ("/infer", NATIVE, {"Prefer": "wait=30"}),
    ],
)
def test_task_of_a_caller_who_hangs_up_is_cancelled(
    address, store, records, until, lane, path, body, headers
):
    sock = call(address, path, body, **headers)
    task_id = until(lambda: submitted(store))
    until(lambda: lane("sentiment") == 1)
    sock.close()
    until(lambda: records.fetch(task_id)[0].state is TaskState.CANCELLED)
    assert lane("sentiment") == 0


def test_task_that_somebody_else_waits_for_goes_on(gunicorn, worker, store, records, until):
    sock = call(gunicorn, "/infer", NATIVE, Prefer="wait=30")
    task_id = until(lambda: submitted(store))
    with store.pubsub() as second:
        second.subscribe(names.result_key(task_id))
        before = times_asked(store)
        sock.close()
        until(lambda: times_asked(store) >= before + 5)
        assert records.fetch(task_id)[0].state is TaskState.QUEUED


def times_asked(store):
    """Return how often anybody has asked Redis who waits."""
    stats = store.info("commandstats")
    return sum(s["calls"] for name, s in stats.items() if name.startswith("cmdstat_pubsub"))


def test_second_waiter_in_the_same_process_counts(app, client, worker, until, monkeypatch):
    monkeypatch.setattr(disconnect, "LEAVE_S", 0.2)
    here = app.extensions["inferno"].gateway
    task_id = client.post("/infer", json=NATIVE).json["task_id"]
    with Waiter(here.bridge, task_id):
        until(lambda: awaited(worker.client))
        assert not disconnect.cancel_unwanted(task_id, here)
        assert here.fetch(task_id)[0].state is TaskState.QUEUED
    monkeypatch.undo()
    assert disconnect.cancel_unwanted(task_id, here)
    assert here.fetch(task_id)[0].state is TaskState.CANCELLED
    done = client.post("/infer", json=NATIVE).json["task_id"]
    worker.succeed(done)
    assert not disconnect.cancel_unwanted(done, here)


def test_two_callers_who_hang_up_together_do_not_keep_each_other_s_task(
    gunicorn, worker, store, records, until
):
    """The second waits for the same task by its id; only the first would cancel it."""
    sock = call(gunicorn, "/infer", NATIVE, Prefer="wait=30")
    task_id = until(lambda: submitted(store))
    with store.pubsub() as second:
        second.subscribe(names.result_key(task_id))
        until(
            lambda: (
                dict(store.pubsub_numsub(names.result_key(task_id)))[
                    names.result_key(task_id).encode()
                ]
                == 1
            )
        )
        sock.close()
    until(lambda: records.fetch(task_id)[0].state is TaskState.CANCELLED)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (NATIVE, {"Idempotency_Key": "back-soon"}),
        (NATIVE | {"webhook": "http://93.184.215.14"}, {}),
    ],
)
def test_task_that_is_wanted_anyway_goes_on(gunicorn, worker, store, records, until, body, headers):
    sock = call(gunicorn, "/infer", body, Prefer="wait=30", **headers)
    task_id = until(lambda: submitted(store))
    # The caller of a second task hangs up later, and that is noticed in the meantime.
    sock.close()
    other = call(gunicorn, "/infer", NATIVE, Prefer="wait=30")
    other_id = until(lambda: _other(store, task_id))
    other.close()
    until(lambda: records.fetch(other_id)[0].state is TaskState.CANCELLED)
    assert records.fetch(task_id)[0].state is TaskState.QUEUED
    worker.succeed(task_id)


def _other(store, task_id):
    newest = submitted(store)
    return None if newest == task_id else newest


def test_answer_still_comes_to_who_stays(gunicorn, worker, store, records, until):
    sock = call(gunicorn, "/infer", NATIVE, Prefer="wait=30")
    # A second request on the same connection, before the first is answered.
    sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    task_id = until(lambda: submitted(store))
    # Someone else's disconnect takes at least one look at the callers.
    other = call(gunicorn, "/infer", NATIVE, Prefer="wait=30")
    other_id = until(lambda: _other(store, task_id))
    other.close()
    until(lambda: records.fetch(other_id)[0].state is TaskState.CANCELLED)
    worker.succeed(task_id)
    with sock:
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert task_id.encode() in received
