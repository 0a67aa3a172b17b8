"""WebSockets on a real server, with a real client."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import pytest
import websocket
from werkzeug.serving import make_server

from inferno import names
from inferno.errors import BrokerUnavailable, DeadlineExceeded, ForwardFailed
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from tasks.gateway import Gateway
from web.sockets import conversation

NATIVE = {"model": "sentiment", "inputs": {"text": "Good."}}


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """Small limits; `max_queued_messages` can be given by indirect parametrisation."""
    changes = {
        "max_queued_messages": getattr(request, "param", 5),
        "max_subscriptions": 10,
        "ping_interval_s": 2.0,
        "send_timeout_s": 6.0,
    }
    return settings.model_copy(update={"websocket": settings.websocket.model_copy(update=changes)})


@pytest.fixture
def url(app):
    """A server of the app, which closes its sockets at the end."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"ws://127.0.0.1:{server.port}"
    app.extensions["peers"].close()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def connect(url):
    """Opens sockets on a path and closes them at the end."""
    with contextlib.ExitStack() as stack:

        def opened(path):
            ws = websocket.create_connection(url + path, timeout=20, skip_utf8_validation=True)
            stack.callback(ws.shutdown)
            return ws

        yield opened


@pytest.fixture
def task_id(client):
    return client.post("/infer", json=NATIVE).get_json()["task_id"]


def say(ws, **message):
    ws.send(json.dumps(message))


def hear(ws):
    return json.loads(ws.recv())


def closing(ws):
    """Return the code and the reason that the server closes with."""
    opcode, frame = ws.recv_data()
    assert opcode == websocket.ABNF.OPCODE_CLOSE, frame
    return int.from_bytes(frame[:2], "big"), frame[2:].decode()


def subscribed(worker, task_id):
    return worker.client.pubsub_channels(names.result_key(task_id))


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_socket_of_one_task_gets_its_result_and_closes(
    client, connect, worker, task_id, until, prefix
):
    ws = connect(f"{prefix}/ws/{task_id}")
    until(lambda: subscribed(worker, task_id))
    worker.succeed(task_id)
    envelope = hear(ws)
    assert envelope["type"] == "result"
    assert envelope["data"] == client.get(f"/tasks/{task_id}").get_json()
    assert closing(ws) == (1000, "")


def test_who_comes_late_gets_the_result_too(connect, worker, task_id):
    worker.succeed(task_id)
    ws = connect(f"/ws/{task_id}")
    assert hear(ws)["type"] == "result"
    assert closing(ws) == (1000, "")


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ForwardFailed("it broke"), TaskState.FAILED),
        (DeadlineExceeded("late"), TaskState.EXPIRED),
    ],
)
def test_failed_task_is_an_error(connect, worker, task_id, error, state):
    worker.fail(task_id, error, state)
    envelope = hear(connect(f"/ws/{task_id}"))
    assert envelope["type"] == "error"
    assert envelope["data"]["status"] == state
    assert envelope["data"]["error"]["code"] == error.code


def test_unknown_task_is_an_error(connect):
    ws = connect("/ws/nobody")
    envelope = hear(ws)
    assert (envelope["type"], envelope["data"]["code"]) == ("error", "task_not_found")
    assert closing(ws) == (1000, "")


def test_wait_that_is_over_says_so(connect, task_id):
    ws = connect(f"/ws/{task_id}?wait=0.05")
    envelope = hear(ws)
    assert (envelope["type"], envelope["data"]["status"]) == ("timeout", "queued")
    assert closing(ws) == (1000, "")


def test_client_that_leaves_is_waited_for_no_longer(connect, worker, task_id, until):
    ws = connect(f"/ws/{task_id}")
    until(lambda: subscribed(worker, task_id))
    ws.close()
    until(lambda: not subscribed(worker, task_id))


@pytest.mark.usefixtures("answering")
def test_conversation_submits_and_hears_the_result_after_the_acceptance(connect):
    ws = connect("/ws")
    for reference in ("first", 2, {"any": "thing"}):
        say(ws, type="submit", id=reference, **NATIVE)
        accepted = hear(ws)
        assert (accepted["type"], accepted["id"]) == ("accepted", reference)
        result = hear(ws)
        assert (result["type"], result["task_id"]) == ("result", accepted["data"]["task_id"])
        assert result["data"]["outputs"]["text"]["data"] == [result["task_id"]]


def test_conversation_takes_every_form_of_a_submit(connect):
    ws = connect("/ws")
    say(ws, type="submit", model_name="sentiment", input_type="text", payload="Good.")
    assert hear(ws)["data"]["job_id"]
    say(ws, type="submit", model_id="sentiment", input="Good.")
    assert hear(ws)["data"]["request_id"]


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize("settings", [100], indirect=True)
def test_burst_of_submits_is_accepted_and_answered_in_full(connect):
    ws = connect("/ws")
    for reference in range(8):
        say(ws, type="submit", id=reference, **NATIVE)
    heard = [hear(ws) for _ in range(16)]
    accepted = {m["id"]: m["data"]["task_id"] for m in heard if m["type"] == "accepted"}
    assert sorted(accepted) == list(range(8))
    results = [message["task_id"] for message in heard if message["type"] == "result"]
    assert sorted(results) == sorted(accepted.values())


def test_flood_of_messages_is_read_as_it_is_handled(connect, app, monkeypatch, until):
    handling, go_on = threading.Event(), threading.Event()

    def slow(self, reference, message):
        handling.set()
        go_on.wait(10)
        self._say(reference, {"type": "pong"})

    monkeypatch.setitem(conversation._HANDLERS, "ping", slow)
    ws = connect("/ws")
    for reference in range(200):
        say(ws, type="ping", id=reference)
    handling.wait(10)
    go_on.set()
    assert [hear(ws)["id"] for _ in range(200)] == list(range(200))


def test_each_result_arrives_once_however_often_it_is_subscribed(connect, worker):
    ws = connect("/ws")
    say(ws, type="submit", **NATIVE)
    task_id = hear(ws)["data"]["task_id"]
    say(ws, type="subscribe", task_id=task_id)
    say(ws, type="subscribe", task_ids=[task_id, task_id])
    worker.succeed(task_id)
    assert hear(ws)["task_id"] == task_id
    say(ws, type="subscribe", task_id=task_id)
    say(ws, type="ping", id=1)
    assert hear(ws) == {"type": "pong", "id": 1}


@pytest.mark.parametrize("settings", [100], indirect=True)
def test_results_that_arrive_together_cost_one_round_trip(app, connect, worker, monkeypatch, until):
    here, arrived, asked = app.extensions["inferno"].gateway, threading.Event(), []
    here.bridge.start()
    until(lambda: worker.client.pubsub_channels(here.bridge.reply_to))
    ws = connect("/ws")
    for reference in range(8):
        say(ws, type="submit", id=reference, **NATIVE)
    ids = [hear(ws)["data"]["task_id"] for _ in range(8)]
    # The socket's process is told on its own channel, and listens to none for each task.
    assert not subscribed(worker, "*")
    read = here.records.records

    def patient(task_ids):
        asked.append(len(task_ids))
        arrived.wait(10)
        return read(task_ids)

    monkeypatch.setattr(here.records, "records", patient)
    for task_id in ids:
        worker.succeed(task_id)
    last = here.bridge.wait(ids[-1], 10)
    assert last is not None
    arrived.set()
    heard = [hear(ws) for _ in ids]
    assert [message["task_id"] for message in heard] == ids
    assert all(message["data"]["finished_at"] for message in heard)
    assert sum(asked) == len(ids)
    assert len(asked) <= 2


@pytest.mark.usefixtures("answering")
def test_result_that_comes_before_its_acceptance_waits_for_it(app, connect, monkeypatch, until):
    publish = Gateway.publish
    over = []

    def slow(self, valid, task_id=None, idempotency=None):
        task = publish(self, valid, task_id, idempotency)
        until(lambda: not self.bridge.awaits(task_id))
        over.append(task_id)
        return task

    monkeypatch.setattr(Gateway, "publish", slow)
    ws = connect("/ws")
    say(ws, type="submit", id=1, **NATIVE)
    accepted, result = hear(ws), hear(ws)
    assert (accepted["type"], accepted["data"]["task_id"]) == ("accepted", over[0])
    assert (result["type"], result["task_id"]) == ("result", over[0])
    say(ws, type="ping")
    assert hear(ws) == {"type": "pong"}


def test_refused_submits_leave_room_for_others(connect, worker):
    ws = connect("/ws")
    for _ in range(12):
        say(ws, type="submit", model="sentiment", inputs={"text": ""})
        assert hear(ws)["data"]["code"] == "invalid_input"
    say(ws, type="submit", **NATIVE)
    task_id = hear(ws)["data"]["task_id"]
    worker.succeed(task_id)
    assert hear(ws)["task_id"] == task_id


def test_conversation_joins_late(client, connect, worker):
    ids = [client.post("/infer", json=NATIVE).get_json()["task_id"] for _ in range(3)]
    for task_id in ids:
        worker.succeed(task_id)
    ws = connect("/ws")
    say(ws, type="subscribe", task_ids=ids)
    assert [hear(ws)["task_id"] for _ in ids] == ids
    say(ws, type="subscribe", task_ids=ids)
    say(ws, type="ping")
    assert hear(ws) == {"type": "pong"}


def test_unsubscribed_task_stays_silent(connect, worker, task_id, until):
    ws = connect("/ws")
    say(ws, type="subscribe", task_id=task_id)
    until(lambda: subscribed(worker, task_id))
    say(ws, type="unsubscribe", task_id=task_id)
    until(lambda: not subscribed(worker, task_id))
    worker.succeed(task_id)
    say(ws, type="ping")
    assert hear(ws) == {"type": "pong"}


def test_cancelled_task_is_told_to_all_who_wait(connect, worker, task_id, until):
    alone, ws = connect(f"/ws/{task_id}"), connect("/ws")
    say(ws, type="subscribe", task_id=task_id)
    until(lambda: subscribed(worker, task_id))
    say(ws, type="cancel", id=1, task_id=task_id)
    heard = {message["type"]: message for message in (hear(ws), hear(ws))}
    assert heard["cancelled"] == {"type": "cancelled", "id": 1, "task_id": task_id}
    for envelope in (heard["error"], hear(alone)):
        assert (envelope["type"], envelope["task_id"]) == ("error", task_id)
        assert envelope["data"]["status"] == "cancelled"
        assert envelope["data"]["error"]["code"] == "task_cancelled"


def test_what_cannot_be_cancelled_is_said_for_each(connect, client, worker, task_id):
    worker.succeed(task_id)
    waiting = client.post("/infer", json=NATIVE).get_json()["task_id"]
    ws = connect("/ws")
    say(ws, type="cancel", id="c", task_ids=["nobody", task_id, waiting])
    answers = [hear(ws) for _ in range(3)]
    assert [answer["id"] for answer in answers] == ["c"] * 3
    assert [answer["data"]["code"] for answer in answers[:2]] == ["task_not_found", "wrong_state"]
    assert [answer["data"]["task_id"] for answer in answers[:2]] == ["nobody", task_id]
    assert answers[2] == {"type": "cancelled", "id": "c", "task_id": waiting}


def test_result_that_redis_could_not_give_arrives_later(
    app, connect, worker, task_id, until, monkeypatch
):
    records = app.extensions["inferno"].records
    read, failures = records.records, [BrokerUnavailable("Redis does not answer")] * 2

    def unsteady(task_ids):
        if failures:
            raise failures.pop()
        return read(task_ids)

    ws = connect("/ws")
    say(ws, type="subscribe", task_id=task_id)
    until(lambda: subscribed(worker, task_id))
    monkeypatch.setattr(records, "records", unsteady)
    worker.succeed(task_id)
    assert (hear(ws)["type"], failures) == ("result", [])
    # Nothing was said meanwhile, and the result comes once.
    say(ws, type="subscribe", task_id=task_id)
    say(ws, type="ping")
    assert hear(ws) == {"type": "pong"}


def test_unknown_task_is_told_by_its_id(connect):
    ws = connect("/ws")
    say(ws, type="subscribe", task_id="nobody")
    message = hear(ws)
    assert (message["type"], message["task_id"]) == ("error", "nobody")
    assert message["data"]["code"] == "task_not_found"


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ("", "invalid_request", None),
        ("nonsense", "invalid_request", None),
        ("[]", "invalid_request", None),
        ("[" * 100_000, "invalid_request", None),
        ('{"id": 5}', "invalid_field", "type"),
        ('{"id": 5, "type": 7}', "invalid_field", "type"),
        ('{"id": 5, "type": "sing"}', "invalid_field", "type"),
        ('{"id": 5, "type": "subscribe", "task_id": 7}', "invalid_field", None),
        ('{"id": 5, "type": "subscribe", "task_ids": "x"}', "invalid_field", None),
        ('{"id": 5, "type": "subscribe", "tasks": []}', "invalid_field", None),
        ('{"id": 5, "type": "cancel", "task_id": 7}', "invalid_field", None),
        ('{"id": 5, "type": "submit"}', "invalid_field", "inputs"),
        ('{"id": 5, "type": "submit", "model": "no", "inputs": 1}', "model_not_found", "model"),
        (
            '{"id": 5, "type": "submit", "model": "sentiment", "inputs": {"text": ""}}',
            "invalid_input",
            "inputs.text",
        ),
    ],
)
def test_bad_message_is_answered_and_the_socket_stays_open(connect, text, code, field):
    ws = connect("/ws")
    ws.send(text)
    message = hear(ws)
    assert message["type"] == "error"
    assert (message["data"]["code"], message["data"].get("field")) == (code, field)
    assert message.get("id") == (5 if '"id": 5' in text else None)
    say(ws, type="ping")
    assert hear(ws) == {"type": "pong"}


def test_too_many_subscriptions_are_refused(client, connect):
    ws = connect("/ws")
    ids = [client.post("/infer", json=NATIVE).get_json()["task_id"] for _ in range(11)]
    say(ws, type="subscribe", id="many", task_ids=ids)
    message = hear(ws)
    assert (message["type"], message["id"]) == ("error", "many")
    assert "10" in message["data"]["detail"]


def test_message_over_the_limit_closes_the_socket(connect, settings):
    ws = connect("/ws")
    # The server hangs up while much is still on its way, so its close frame may be lost.
    with contextlib.suppress(OSError):
        ws.send("x" * (settings.limits.max_body_bytes + 1))
        code, reason = closing(ws)
        assert code == 1009
        assert reason == f"the message is larger than {settings.limits.max_body_bytes} bytes"


def test_large_result_arrives_whole(connect, worker, task_id):
    text = "0123456789" * 500_000
    worker.succeed(task_id, {"text": {"dtype": "string", "shape": [1], "data": [text]}})
    ws = connect("/ws")
    say(ws, type="subscribe", task_id=task_id)
    assert hear(ws)["data"]["outputs"]["text"]["data"] == [text]
    assert hear(connect(f"/ws/{task_id}"))["data"]["outputs"]["text"]["data"] == [text]


def test_slow_reader_is_closed(client, connect, worker, app, until):
    ids = [client.post("/infer", json=NATIVE).get_json()["task_id"] for _ in range(10)]
    outputs = {"text": {"dtype": "string", "shape": [1], "data": ["x" * 8_000_000]}}
    ws = connect("/ws")
    ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    say(ws, type="subscribe", task_ids=ids)
    until(lambda: subscribed(worker, ids[-1]))
    for task_id in ids:
        worker.succeed(task_id, outputs)
    # Nobody reads: the queue overflows, and then the kernel finds that nothing is taken.
    until(lambda: not app.extensions["peers"], 30)
    until(lambda: not subscribed(worker, "*"))


def test_reader_that_catches_up_is_told_why_it_was_closed(client, connect, worker, app, until):
    ids = [client.post("/infer", json=NATIVE).get_json()["task_id"] for _ in range(10)]
    outputs = {"text": {"dtype": "string", "shape": [1], "data": ["x" * 8_000_000]}}
    ws = connect("/ws")
    say(ws, type="subscribe", task_ids=ids)
    until(lambda: subscribed(worker, ids[-1]))
    for task_id in ids:
        worker.succeed(task_id, outputs)
    heard = 0
    while (frame := ws.recv_data())[0] == websocket.ABNF.OPCODE_TEXT:
        heard += 1
    assert heard < len(ids)
    assert int.from_bytes(frame[1][:2], "big") == 1013


def test_sockets_are_told_that_the_server_stops(app, connect):
    ws = connect("/ws")
    say(ws, type="ping")
    assert hear(ws) == {"type": "pong"}
    app.extensions["peers"].close()
    assert closing(ws)[0] == 1001


def test_plain_http_on_a_socket_s_path_is_a_problem(client):
    response = client.get("/ws")
    assert (response.status_code, response.headers["Upgrade"]) == (426, "websocket")
    assert response.mimetype == "application/problem+json"


def test_submit_with_a_key_is_done_once(connect, worker, lane):
    ws = connect("/ws")
    submit = NATIVE | {"type": "submit", "idempotency_key": "once"}
    say(ws, id=1, **submit)
    first = hear(ws)
    assert (first["type"], first["id"], "replayed" in first) == ("accepted", 1, False)
    say(ws, id=2, **submit)
    again = hear(ws)
    assert (again["type"], again["id"], again["replayed"]) == ("accepted", 2, True)
    assert again["data"] == first["data"]
    assert lane("sentiment") == 1
    # Also on another socket, and when the task is over.
    other = connect("/ws")
    say(other, id=3, **submit)
    assert hear(other)["data"] == first["data"]
    task_id = first["data"]["task_id"]
    worker.succeed(task_id)
    assert hear(ws)["task_id"] == hear(other)["task_id"] == task_id
    late = connect("/ws")
    say(late, **submit)
    assert [hear(late)["type"] for _ in range(2)] == ["accepted", "result"]


def test_key_of_another_submit_is_refused(connect):
    ws = connect("/ws")
    say(ws, type="submit", idempotency_key="mine", **NATIVE)
    assert hear(ws)["type"] == "accepted"
    say(ws, type="submit", idempotency_key="mine", priority=2, **NATIVE)
    assert hear(ws)["data"]["code"] == "idempotency_key_reused"
    for key in ("", "x" * 256, 7):
        say(ws, type="submit", idempotency_key=key, **NATIVE)
        assert hear(ws)["data"]["field"] == "idempotency_key"


@pytest.mark.parametrize("path", ["/ws", "/ws/{}"])
def test_socket_hears_that_a_deadline_has_passed_without_a_worker(client, connect, path, records):
    task_id = client.post("/infer", json=NATIVE | {"timeout_ms": 500}).json["task_id"]
    ws = connect(path.format(task_id))
    if path == "/ws":
        say(ws, type="subscribe", task_id=task_id)
    answer = hear(ws)
    assert (answer["type"], answer["data"]["status"]) == ("error", "expired")
    assert records.fetch(task_id)[0].state is TaskState.EXPIRED


def test_submit_on_a_socket_hears_that_its_deadline_has_passed(connect):
    ws = connect("/ws")
    say(ws, type="submit", timeout_ms=1, **NATIVE)
    assert [hear(ws)["type"] for _ in range(2)] == ["accepted", "error"]
