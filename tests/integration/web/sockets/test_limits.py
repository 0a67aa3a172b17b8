"""What one client may cost, on a real web process with small limits."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from time import monotonic

import pytest

from tests.integration.web.sockets.conftest import Bystander
from tests.integration.web.sockets.raw import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    RawSocket,
    frame,
)

NATIVE = {"model": "sentiment", "inputs": {"text": "Good."}}
MOST = 12_000_000

BROKEN = {
    "message that is declared too big": ([frame(declared=MOST + 1)], 1009),
    "frame with the largest length": ([frame(declared=2**63 - 1)], 1009),
    "fragments that are too big together": (
        [frame(b"{", fin=False), *[frame(b"", 0, fin=False)] * 9, frame(b"", 0, declared=MOST)],
        1009,
    ),
    "text that is no UTF-8": ([frame(b"\xff\xfe")], 1007),
    "text that ends within a character": ([frame(b'"\xc3')], 1007),
    "compressed frame": ([frame(b"{}", reserved=4)], 1002),
    "frame without a mask": ([frame(b"{}", masked=False)], 1002),
    "unknown kind": ([frame(b"", 3)], 1002),
    "control frame in pieces": ([frame(b"", PING, fin=False)], 1002),
    "long ping": ([frame(bytes(126), PING)], 1002),
    "length with a sign": ([frame(declared=2**63)], 1002),
    "continuation of nothing": ([frame(b"{}", 0)], 1002),
    "message within a message": ([frame(b"{", fin=False), frame(b"{}")], 1002),
    "close frame of one byte": ([frame(b"\x03", CLOSE)], 1002),
    "close frame with a reserved code": ([frame(b"\x03\xee", CLOSE)], 1002),
}


@pytest.mark.parametrize(("frames", "code"), BROKEN.values(), ids=BROKEN)
def test_broken_frames_close_the_socket(server, frames, code):
    with RawSocket(server.address) as ws:
        ws.send(*frames)
        assert ws.closing()[0] == code


def test_message_in_pieces_is_one_message(server):
    text = json.dumps({"type": "ping", "id": "Grüße 🙂"}, ensure_ascii=False).encode()
    pieces = [text[at : at + 1] for at in range(len(text))]
    with RawSocket(server.address) as ws:
        ws.send(frame(b"", fin=False), *(frame(piece, 0, fin=False) for piece in pieces))
        # Pings may come between the pieces of a message.
        ws.send(frame(b"here?", PING), frame(b"", 0))
        assert ws.receive() == (PONG, b"here?")
        assert ws.hear() == {"type": "pong", "id": "Grüße 🙂"}
        ws.send(frame(text, BINARY))
        assert ws.hear()["type"] == "pong"


@pytest.mark.parametrize(
    "half",
    [
        pytest.param(frame(b"{}")[:1], marks=pytest.mark.long),
        pytest.param(frame(declared=1000)[:-2], marks=pytest.mark.long),
        frame(declared=1000) + b"half",
        frame(b"{", fin=False),
        pytest.param(frame(b"\x03\xe8", CLOSE)[:-1], marks=pytest.mark.long),
    ],
)
def test_message_must_be_complete_in_time(server, half):
    with RawSocket(server.address) as ws:
        begun = monotonic()
        ws.send(half)
        assert ws.closing()[0] == 1008
        assert monotonic() - begun < 5


def test_client_that_answers_no_pings_is_closed(server):
    with RawSocket(server.address) as ws:
        assert ws.receive()[0] == PING
        assert ws.closing() == (1008, "no answer to a ping")


def test_client_that_answers_pings_stays(server):
    with RawSocket(server.address) as ws:
        for _ in range(3):
            opcode, payload = ws.receive()
            assert opcode == PING
            ws.send(frame(payload, PONG))


@pytest.mark.parametrize("reference", ["x" * 255, ["x" * 100] * 3, {"x" * 300: 1}])
def test_long_reference_is_refused(server, reference):
    with RawSocket(server.address) as ws:
        ws.say(type="ping", id=reference)
        answer = ws.hear()
        assert (answer["data"]["code"], answer["data"]["field"]) == ("invalid_field", "id")
        assert "id" not in answer
        assert len(json.dumps(answer)) < 500


@pytest.mark.parametrize("kind", ["subscribe", "unsubscribe", "cancel"])
def test_message_names_only_so_many_tasks(server, kind):
    with RawSocket(server.address) as ws:
        ws.say(type=kind, id=1, task_ids=[f"{number:06}" for number in range(1001)])
        answer = ws.hear()
        assert (answer["id"], answer["data"]["field"]) == (1, "task_ids")
        assert answer["data"]["detail"] == "expected at most 1000 task ids, got 1001"
        ws.say(type=kind, id=2, task_id="x" * 256)
        assert ws.hear()["data"]["code"] == "invalid_field"


def test_task_that_is_named_twice_is_cancelled_once(server):
    with RawSocket(server.address) as ws:
        ws.say(type="cancel", id=1, task_ids=["nobody"] * 5000, task_id="nobody")
        assert ws.hear()["data"]["code"] == "task_not_found"
        ws.say(type="ping", id=2)
        assert ws.hear() == {"type": "pong", "id": 2}


def test_many_tasks_are_subscribed_and_cancelled_in_order(server, worker, lane):
    with RawSocket(server.address) as ws:
        for number in range(250):
            ws.say(type="submit", id=number, **NATIVE)
        accepted = {answer["id"]: answer["data"]["task_id"] for answer in take(ws, 250)}
        ids = [accepted[number] for number in range(250)]
        with RawSocket(server.address) as other:
            other.say(type="subscribe", task_ids=ids)
            other.say(type="cancel", id="c", task_ids=ids)
            heard = take(other, 500)
            cancelled = [one["task_id"] for one in heard if one["type"] == "cancelled"]
            assert cancelled == ids
            assert sorted(one["task_id"] for one in heard if one["type"] == "error") == sorted(ids)
            # Once they are over, they are told at once, in order.
            with RawSocket(server.address) as late:
                late.say(type="subscribe", task_ids=[*ids, *ids])
                assert [one["task_id"] for one in take(late, 250)] == ids
                late.say(type="ping", id=1)
                assert late.hear() == {"type": "pong", "id": 1}


def take(ws, count):
    return [ws.hear() for _ in range(count)]


def test_work_for_a_client_that_has_gone_stops(server, until):
    before = server.process.cpu_times().user
    with RawSocket(server.address) as ws:
        for start in range(40):
            ids = [f"{number:06}" for number in range(start * 1000, (start + 1) * 1000)]
            ws.say(type="cancel", id=1, task_ids=ids)
        assert ws.hear()["data"]["code"] == "task_not_found"
    until(lambda: server.connections() == 0, 20)
    # 40,000 ids would take several times as long.
    assert server.process.cpu_times().user - before < 2


def test_fast_sender_is_read_later_and_not_closed(server):
    """2,000 messages a second are allowed, and 2,000 more at once."""
    with RawSocket(server.address) as ws:
        begun = monotonic()
        sender = threading.Thread(target=ws.send, args=[frame(b'{"type":"ping"}')] * 5000)
        sender.start()
        assert all(one == {"type": "pong"} for one in take(ws, 5000))
        assert monotonic() - begun > 1
        sender.join()


FLOODS = {
    "pings": frame(bytes(100), PING) * 30_000,
    "empty fragments": frame(b"", fin=False) + frame(b"", 0, fin=False) * 100_000,
    "tiny messages": frame(b"{}") * 50_000,
    "messages with a long reference": frame(b'{"type":"ping","id":"%b"}' % (b"x" * 4_000_000)) * 5,
    "close frames": frame(b"\x03\xe8", CLOSE) * 50_000,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("reads", [pytest.param(True, marks=pytest.mark.long), False])
def test_flood_harms_nobody_else(server, flood, reads, until):
    assert server.get("/health/live") == 200
    before = server.megabytes()
    with Bystander(server.address) as bystander, RawSocket(server.address) as ws:
        sender = threading.Thread(target=pour, args=(ws, flood), daemon=True)
        sender.start()
        if reads:
            threading.Thread(target=drain, args=(ws,), daemon=True).start()
        until(lambda: len(bystander.waits_s) >= 10)
        grown = server.megabytes() - before
        with contextlib.suppress(OSError):
            ws.sock.shutdown(socket.SHUT_RDWR)
        sender.join()
    assert max(bystander.waits_s) < 1
    assert grown < 60


def pour(ws, flood):
    with contextlib.suppress(OSError):
        ws.send(flood)


def drain(ws):
    with contextlib.suppress(OSError):
        while ws.sock.recv(65_536):
            pass


def test_sockets_that_never_read_are_closed_and_their_memory_is_free(server, worker, client, until):
    """Seven clients ask for 6 MB each, and the process may hold 16 MB for all of them."""
    outputs = {"text": {"dtype": "string", "shape": [1], "data": ["x" * 6_000_000]}}
    ids = [client.post("/infer", json=NATIVE).get_json()["task_id"] for _ in range(7)]
    for task_id in ids:
        worker.succeed(task_id, outputs)
    assert server.get("/health/live") == 200
    before = server.megabytes()
    sockets = [RawSocket(server.address, receive_buffer=4096) for _ in range(7)]
    for ws, task_id in zip(sockets, ids, strict=True):
        ws.say(type="subscribe", task_id=task_id)
    with Bystander(server.address) as bystander:
        # Some are closed for what all of them hold, and the others for taking nothing.
        until(lambda: server.connections() <= 1, 20)
        until(lambda: server.megabytes() < before + 40, 20)
    assert max(bystander.waits_s) < 1
    # A client that reads gets its result.
    with RawSocket(server.address) as ws:
        ws.say(type="subscribe", task_id=ids[0])
        assert ws.hear()["task_id"] == ids[0]
    for ws in sockets:
        ws.sock.close()
