"""Results reach whoever waits for them, once, however the connection fares."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time

import pytest
import redis

from inferno import names
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from tasks.broker.connection import connect
from tasks.broker.lanes import Held
from tasks.results.bridge import Bridge, Waiter
from tasks.state.outcomes import encode_outcome
from tasks.state.records import Record, Records
from tasks.state.transitions import Arrival, Step


@pytest.fixture
def bridge(settings, store):
    client = connect(settings)
    bridge = Bridge(client, Records(client, settings), settings.redis.prefix, "inferno-web")
    yield bridge
    bridge.stop()
    client.close()


def channels(store):
    return store.pubsub_channels(names.result_key("*"))


def calls(store, command):
    return store.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)


def test_outcome_wakes_its_waiter(bridge, worker, store, until):
    with Waiter(bridge, "one") as waiter:
        until(lambda: channels(store))
        worker.succeed("one")
        outcome = waiter.wait(10)
    assert outcome is not None
    assert outcome.task_id == "one"
    assert outcome.succeeded


def test_outcome_from_before_anyone_waited_is_found(bridge, worker):
    worker.succeed("early")
    assert bridge.wait("early", 10).task_id == "early"
    assert bridge.wait("early", 10).task_id == "early", "and found again"


def test_waiting_ends_with_patience(bridge):
    assert bridge.wait("never", 0.01) is None
    assert bridge.wait("never", 0) is None


def test_only_what_is_waited_for_is_subscribed(bridge, store, until):
    subscriptions = [bridge.subscribe(f"task-{n}", print) for n in range(5)]
    until(lambda: len(channels(store)) == 5)
    for subscription in subscriptions[1:]:
        subscription.close()
    until(lambda: channels(store) == [names.result_key("task-0").encode()])


def test_every_subscriber_is_told_once(bridge, worker, store, until):
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    for _ in range(3):
        bridge.subscribe("shared", lambda outcome: told.put(outcome.task_id))
    leaver = bridge.subscribe("shared", lambda outcome: told.put("left"))
    until(lambda: channels(store))
    leaver.close()
    worker.succeed("shared")
    payload = store.get(names.result_key("shared"))
    store.publish(names.result_key("shared"), payload)
    bridge.subscribe("shared", lambda outcome: told.put("late"))
    assert sorted(told.get(timeout=10) for _ in range(4)) == ["late", "shared", "shared", "shared"]
    # Nothing else can come before what is published later.
    bridge.subscribe("last", lambda outcome: told.put("last"))
    worker.succeed("last")
    assert told.get(timeout=10) == "last"


def test_two_hundred_waiters_share_one_connection(bridge, worker, store, until):
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def wait(task_id):
        with Waiter(bridge, task_id) as waiter:
            answers.put(task_id if waiter.wait(20) else "nothing came")

    ids = [f"task-{n}" for n in range(200)]
    threads = [threading.Thread(target=wait, args=(task_id,)) for task_id in ids]
    for thread in threads:
        thread.start()
    until(lambda: len(channels(store)) == 200)
    # That of another test may not have ended yet.
    subscribed = [int(c["sub"]) for c in store.client_list() if c["name"] == "inferno-web"]
    assert max(subscribed) >= 200
    for task_id in ids:
        worker.succeed(task_id)
    for thread in threads:
        thread.join(20)
    assert sorted(answers.get() for _ in ids) == sorted(ids)
    until(lambda: not channels(store))


def test_known_ids_travel_in_one_subscribe(bridge, store, until):
    store.config_resetstat()
    # The bridge connects only now, so these all wait for it.
    subscriptions = [bridge.subscribe(f"task-{n}", print) for n in range(100)]
    until(lambda: len(channels(store)) == 100)
    assert calls(store, "subscribe") <= 10
    assert calls(store, "exists") == calls(store, "subscribe") - 1, "one is for its own channel"
    assert calls(store, "mget") == 0, "nothing was stored, so nothing is fetched"
    for subscription in subscriptions:
        subscription.close()
    until(lambda: not channels(store))
    assert calls(store, "unsubscribe") <= 10


GEVENT = """
from gevent import monkey; monkey.patch_all()
import sys, gevent
from inferno.settings import Settings
from tasks.broker.connection import connect
from tasks.state.records import Records
from tasks.results.bridge import Bridge
settings = Settings(redis={"url": sys.argv[1]})
client = connect(settings)
bridge = Bridge(client, Records(client, settings), settings.redis.prefix, "inferno-web")
gevent.joinall([gevent.spawn(bridge.wait, f"task-{n}", 0.5) for n in range(64)])
print(client.info("commandstats")["cmdstat_subscribe"]["calls"])
"""


def test_waiters_that_come_together_share_a_subscribe_under_gevent(store, redis_url):
    store.config_resetstat()
    command = [sys.executable, "-c", GEVENT, redis_url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == 2, "its own channel, and those of the waiters"


def test_lost_connection_loses_no_result(bridge, worker, store, until):
    with Waiter(bridge, "before") as before, Waiter(bridge, "after") as after:
        until(lambda: len(channels(store)) == 2)
        store.client_kill_filter(_type="pubsub")
        # Nobody listens now; the lookup after the reconnect finds it.
        worker.succeed("before")
        assert before.wait(10)
        until(lambda: channels(store) == [names.result_key("after").encode()])
        worker.succeed("after")
        assert after.wait(10)


def test_results_arrive_after_redis_was_down(tmp_path, until):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    url = f"redis://127.0.0.1:{port}/0"
    settings = Settings.model_validate({"redis": {"url": url}})
    client = connect(settings)
    bridge = Bridge(client, Records(client, settings), settings.redis.prefix, "inferno-web")
    with Waiter(bridge, "patient") as waiter, redis.Redis.from_url(url) as store:
        with running(command):
            until(lambda: _subscribed(store))
        with running(command):
            until(lambda: _subscribed(store))
            success = b'{"task_id": "patient", "status": "SUCCESS", "result": {}}'
            store.publish(names.result_key("patient"), success)
            assert waiter.wait(10)
    bridge.stop()
    client.close()


@contextlib.contextmanager
def running(command):
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        yield
        server.terminate()


def _subscribed(store):
    try:
        return channels(store)
    except redis.ConnectionError:
        return False


def test_what_is_no_result_disturbs_nobody(bridge, worker, store, until):
    with Waiter(bridge, "one") as waiter:
        until(lambda: channels(store))
        store.publish(names.result_key("one"), b"nonsense")
        store.publish(
            names.result_key("one"), b'{"task_id": "one", "status": "STARTED", "result": null}'
        )
        worker.succeed("one")
        assert waiter.wait(10)


def test_failing_callback_leaves_the_others_alone(bridge, worker, caplog):
    bridge.subscribe("one", lambda outcome: 1 / 0)
    with Waiter(bridge, "one") as waiter:
        worker.succeed("one")
        assert waiter.wait(10)
    assert "ZeroDivisionError" in caplog.text


def test_stopping_ends_the_threads_whatever_they_do(settings, store):
    for start in (True, False):
        client = connect(settings)
        bridge = Bridge(client, Records(client, settings), settings.redis.prefix, "inferno-web")
        if start:
            bridge.subscribe("one", print)
        bridge.stop()
        client.close()
    names_of_threads = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names_of_threads if name.startswith("bridge")]


def test_outcomes_of_own_tasks_come_in_one_message(bridge, store, worker, until):
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    transitions = worker.transitions
    ids = [f"own-{n}" for n in range(3)]
    worker.succeed("early")
    assert bridge.wait("early", 10), "it is connected"
    for task_id in ids:
        bridge.expect(task_id, lambda outcome: told.put(outcome.task_id))
    until(lambda: not channels(store))
    records = [
        Record(i, "m", 1, TaskState.QUEUED, time.time(), reply_to=bridge.reply_to) for i in ids
    ]
    transitions.accept([Arrival(record, "", b"") for record in records])
    store.config_resetstat()
    payloads = {i: encode_outcome(i, b"{}") for i in ids}
    transitions.finish(
        [
            Step(i, Held(), transitions.commands.ended({}, i, TaskState.SUCCEEDED, payload))
            for i, payload in payloads.items()
        ]
    )
    assert sorted(told.get(timeout=10) for _ in ids) == ids
    # One for whoever else listens to each task, and one for all of them.
    assert calls(store, "publish") == len(ids) + 1


def test_expected_outcome_survives_a_lost_connection(bridge, store, worker, until):
    with Waiter(bridge, "own", expected=True) as waiter:
        until(lambda: store.pubsub_numsub(bridge.reply_to)[0][1] == 1)
        store.client_kill_filter(_type="pubsub")
        worker.succeed("own")
        assert waiter.wait(10)
