"""The state machine of a task, as its scripts keep it in a real Redis."""

from __future__ import annotations

import base64
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, cast

import msgspec
import pytest
import redis
from celery import Celery
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis.client import PubSub

import tasks.transport.lane
from inferno import names
from inferno.errors import ForwardFailed, KeyReused, Overloaded, TaskCancelled
from inferno.protocol.tasks import TRANSITIONS, TaskState
from inferno.settings import Settings
from tasks.broker.lanes import Held, Lanes, TaskMessage
from tasks.state.outcomes import encode_outcome
from tasks.state.records import Record, Records
from tasks.state.transitions import Idempotency, Rider, Step, Transitions, Verdict
from tasks.transport import StreamLane
from tasks.transport.script import Script
from tests.integration.conftest import accept


@pytest.fixture
def lane(client: redis.Redis) -> Iterator[str]:
    """A lane of its own."""
    key = StreamLane.of(f"lane-{uuid.uuid4().hex[:8]}").key
    yield key
    Script("tasks.transport", "delete").run(client, {"lane": key})


def new_record(**fields: Any) -> Record:
    return msgspec.structs.replace(
        Record(str(uuid.uuid4()), "m", 1, TaskState.QUEUED, time.time(), priority=3), **fields
    )


def take(client: redis.Redis, lane: str, consumer: str, limit: int = 100) -> list[Held]:
    """Fetch what waits in a lane, as a consumer."""
    fields = {"lane": lane, "consumer": consumer, "lease_ms": 60_000, "limit": limit}
    fetched = Script("tasks.transport", "fetch").run(client, fields)
    return [Held(stream.decode(), entry.decode()) for stream, entry, _ in fetched]


def as_consumer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tasks.transport.lane, "_process", (os.getpid(), name))


def rider(record: Record, held: Held) -> Rider:
    return Rider(record.task_id, held, "m", 1, record.accepted_at, 3)


def success(transitions: Transitions, record: Record, held: Held) -> Step:
    payload = encode_outcome(record.task_id, b'{"outputs":{}}')
    return Step(
        record.task_id,
        held,
        transitions.commands.ended({}, record.task_id, TaskState.SUCCEEDED, payload),
    )


def test_record_and_message_appear_together(transitions, records, client, lane):
    record = new_record(deadline=time.time() + 60, webhook="https://a.example")
    assert accept(transitions, record, lane, "{}") == record.task_id
    stored, outcome = records.fetch(record.task_id)
    assert msgspec.structs.replace(stored, location=Held()) == record
    assert stored.location.stream == f"{lane}:3"
    assert outcome is None
    assert client.xrange(stored.location.stream)[0][0].decode() == stored.location.entry
    newest = records.newest(10, lambda found: found.task_id == record.task_id)
    assert newest.items == [stored]


def test_to_accept_again_adds_nothing(transitions, client, lane):
    """A client whose connection was cut may repeat it, not knowing whether it was done."""
    record = new_record()
    for _ in range(3):
        assert accept(transitions, record, lane, "{}") == record.task_id
    assert client.xlen(f"{lane}:3") == 1


def test_a_key_makes_one_task_however_many_ask_at_once(transitions, client, lane):
    key = Idempotency(uuid.uuid4().hex, "body")

    def ask(_: int) -> str:
        return accept(transitions, new_record(), lane, "{}", idempotency=key)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(32)))) == 1
    assert client.xlen(f"{lane}:3") == 1
    with pytest.raises(KeyReused):
        accept(
            transitions, new_record(), lane, "{}", idempotency=replace(key, fingerprint="another")
        )


def test_more_than_fit_before_a_deadline_are_refused(transitions, records, lane):
    for _ in range(3):
        accept(transitions, new_record(), lane, "{}", most_waiting=2)
    late = new_record()
    with pytest.raises(Overloaded):
        accept(transitions, late, lane, "{}", most_waiting=2)
    assert records.fetch(late.task_id) == (None, None)


def test_only_so_many_tasks_can_be_listed(client, settings, lane):
    few = settings.model_copy(
        update={
            "tasks": settings.tasks.model_copy(update={"listed": 3}),
            "redis": settings.redis.model_copy(update={"prefix": f"{lane}:few:"}),
        }
    )
    transitions, records = Transitions(client, few), Records(client, few)
    ids = [accept(transitions, new_record(), "", "") for _ in range(5)]
    page = records.newest(10, lambda record: True)
    assert [record.task_id for record in page.items] == ids[:1:-1]


def test_a_full_redis_takes_all_of_it_or_nothing(transitions, records, client, lane):
    record = new_record()
    client.config_set("maxmemory", 1)
    try:
        # Redis 6.2 tells of it as of any other error in a script.
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            accept(transitions, record, lane, "{}", idempotency=Idempotency("k" + lane, "b"))
    finally:
        client.config_set("maxmemory", 0)
    assert records.fetch(record.task_id) == (None, None)
    assert not client.exists(f"{lane}:3")
    assert not client.exists(names.idempotency_key("inferno:", "k" + lane))


def test_more_messages_are_settled_at_once_than_lua_unpacks(transitions, client, lane, monkeypatch):
    as_consumer(monkeypatch, "me")
    with client.pipeline() as pipe:
        for _ in range(8100):
            pipe.xadd(f"{lane}:3", {"message": "{}"})
        pipe.execute()
    held = take(client, lane, "me", limit=9000)
    steps = [Step(str(number), entry) for number, entry in enumerate(held)]
    assert transitions.finish(steps) == [Verdict.DONE] * 8100
    assert client.xlen(f"{lane}:3") == 0


def test_what_another_consumer_has_cannot_be_settled(
    transitions, records, client, lane, monkeypatch
):
    record = new_record()
    accept(transitions, record, lane, "{}")
    (held,) = take(client, lane, "first")
    as_consumer(monkeypatch, "second")
    assert transitions.begin([rider(record, held)], "b")[record.task_id].verdict is Verdict.STALE
    assert transitions.finish([success(transitions, record, held)]) == [Verdict.STALE]
    assert records.fetch(record.task_id)[1] is None
    assert client.xlen(held.stream) == 1
    as_consumer(monkeypatch, "first")
    begun = transitions.begin([rider(record, held)], "b")[record.task_id]
    assert (begun.verdict, begun.attempts) == (Verdict.DONE, 1)
    # The answer to the first call may have been lost.
    assert transitions.begin([rider(record, held)], "b")[record.task_id] == begun
    assert transitions.finish([success(transitions, record, held)]) == [Verdict.DONE]
    assert transitions.finish([success(transitions, record, held)]) == [Verdict.OVER]
    assert client.xlen(held.stream) == 0


def test_of_a_batch_each_entry_is_asked_for_that_another_consumer_may_have(
    transitions, client, lane, monkeypatch
):
    """Entry ids do not sort as text does, and entries of another consumer stand between."""
    as_consumer(monkeypatch, "mine")
    stream = f"{lane}:3"
    client.xgroup_create(stream, "workers", "0", mkstream=True)
    riders = {}
    for number in range(8, 28):
        client.xadd(stream, {"message": "{}"}, id=f"5-{number}")
        consumer = "another" if number % 5 == 0 else "mine"
        client.xreadgroup("workers", consumer, {stream: ">"})
        held = Held(stream, f"5-{number}")
        riders[rider(new_record(), held)] = Verdict.STALE if consumer == "another" else Verdict.DONE
    begun = transitions.begin(list(riders), "batch")
    assert [begun[rider.task_id].verdict for rider in riders] == list(riders.values())
    payload = encode_outcome("any", b'{"outputs":{}}')
    steps = [
        Step(
            r.task_id,
            r.held,
            transitions.commands.ended({}, r.task_id, TaskState.SUCCEEDED, payload),
        )
        for r in riders
    ]
    assert transitions.finish(steps) == list(riders.values())
    assert client.xlen(stream) == list(riders.values()).count(Verdict.STALE)


def test_a_record_that_has_waited_for_long_lives_on_when_its_task_begins(
    transitions, client, lane, settings, monkeypatch
):
    as_consumer(monkeypatch, "mine")
    record = new_record(accepted_at=time.time() - 0.6 * settings.tasks.record_ttl_s)
    accept(transitions, record, lane, "{}")
    key = names.record_key(settings.redis.prefix, record.task_id)
    client.expire(key, 60)
    (held,) = take(client, lane, "mine")
    transitions.begin([rider(record, held)], "batch")
    assert client.ttl(key) > 60


def test_one_that_was_running_before_is_a_suspect(transitions, client, lane, monkeypatch):
    as_consumer(monkeypatch, "first")
    record = new_record()
    accept(transitions, record, lane, "{}")
    (held,) = take(client, lane, "first")
    transitions.begin([rider(record, held)], "batch-1")
    suspect = transitions.begin([rider(record, held)], "batch-2")[record.task_id]
    assert (suspect.verdict, suspect.attempts, suspect.batch_id) == (Verdict.SUSPECT, 1, "batch-1")
    alone = transitions.begin([rider(record, held)], "batch-2", alone=True)[record.task_id]
    assert (alone.verdict, alone.attempts, alone.batch_id) == (Verdict.DONE, 2, "batch-2")


def claim(client: redis.Redis, held: Held, consumer: str) -> bool:
    """Take an entry over from whoever has it; say whether there was any."""
    if not client.exists(held.stream):
        return False
    return bool(client.xclaim(held.stream, "workers", consumer, 0, [held.entry]))


def cancelled(transitions: Transitions, task_id: str, held: Held) -> Step:
    payload = encode_outcome(task_id, TaskCancelled("it was cancelled"))
    return Step(
        task_id, held, transitions.commands.ended({}, task_id, TaskState.CANCELLED, payload)
    )


def heard(listener: PubSub) -> dict[str, Any] | None:
    """Return the next message, or None at the end."""
    while (message := listener.get_message(timeout=5)) is None:
        pass  # That of the subscription.
    return None if message["data"] == b"the end" else message


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fetch", "claim", "begin", "succeed", "fail", "retry", "cancel", "due"]),
        st.sampled_from(["a", "b"]),
    ),
    max_size=14,
)


@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_no_order_of_events_breaks_the_state_machine(
    steps: list[tuple[str, str]], client: redis.Redis, settings: Settings
) -> None:
    """Two workers, who may each think that the task is theirs, and a client who cancels it.

    Whatever happens in which order: states follow each other as documented, there is at most one
    outcome, and it stays; an attempt is counted for each pass; as long as there is no outcome, the
    message is in the lane, once.
    """
    lane = StreamLane.of(f"lane-{uuid.uuid4().hex[:8]}").key
    record = new_record()
    with client.pubsub(ignore_subscribe_messages=True) as listener:
        channel = names.result_key(record.task_id)
        listener.subscribe(channel)
        state = happen(steps, client, settings, lane, record)
        client.publish(channel, "the end")
        outcomes = list(iter(partial(heard, listener), None))
        assert len(outcomes) == state.terminal


def happen(
    steps: list[tuple[str, str]],
    client: redis.Redis,
    settings: Settings,
    lane: str,
    record: Record,
) -> TaskState:
    """Carry the steps out, look at everything after each, and return the last state."""
    transitions, records = Transitions(client, settings), Records(client, settings)
    task_id = record.task_id
    accept(transitions, record, lane, '{"id": 1}')
    held: dict[str, Held] = {}
    #: Workers settle what they have begun.
    running: dict[str, Held] = {}
    state, attempts = TaskState.QUEUED, 0

    def as_worker(name: str, action: Callable[[str], None]) -> None:
        before = tasks.transport.lane._process
        tasks.transport.lane._process = (os.getpid(), name)
        try:
            action(name)
        finally:
            tasks.transport.lane._process = before

    def finish(worker: str, commands: Callable[[], list[Any]]) -> None:
        transitions.finish([Step(task_id, held[worker], commands())])

    def begin(worker: str) -> None:
        nonlocal attempts
        batch = uuid.uuid4().hex
        begun = transitions.begin([rider(record, held[worker])], batch, alone=True)[task_id]
        if begun.verdict is Verdict.DONE:
            attempts += 1
            running[worker] = held[worker]

    def end(state: TaskState, result: Any) -> Callable[[], list[Any]]:
        return lambda: transitions.commands.ended(
            {}, task_id, state, encode_outcome(task_id, result)
        )

    def retry() -> list[Any]:
        due_ms = round(time.time() * 1000) + 60_000
        delay = {"lane": lane, "priority": 3, "message": b'{"id": 1}', "due_ms": due_ms}
        return [*transitions.commands.retried(task_id, 1, 0.0), {"kind": "delay", **delay}]

    for event, worker in steps:
        if event == "fetch":
            for entry in take(client, lane, worker):
                held[worker] = entry
        elif event == "claim":
            # The other one is thought dead.
            other = "b" if worker == "a" else "a"
            if other in held and claim(client, held[other], worker):
                held[worker] = held[other]
        elif event == "due":
            for message in cast(list[bytes], client.zrange(f"{lane}:delayed", 0, -1)):
                client.zrem(f"{lane}:delayed", message)
                client.xadd(f"{lane}:3", {"message": message[1:]})
        elif event == "cancel":
            where, _ = records.fetch(task_id)
            assert where is not None
            transitions.finish([cancelled(transitions, task_id, where.location)], fenced=False)
        elif worker in held and (event in ("begin", "fail") or running.get(worker) == held[worker]):
            action: dict[str, Callable[[str], None]] = {
                "begin": begin,
                "succeed": lambda name: finish(name, end(TaskState.SUCCEEDED, b"1")),
                "fail": lambda name: finish(name, end(TaskState.FAILED, ForwardFailed("no"))),
                "retry": lambda name: finish(name, retry),
            }
            as_worker(worker, action[event])
        found, outcome = records.fetch(task_id)
        assert found is not None
        if found.state is not state:
            assert found.state in TRANSITIONS[state], f"{state} -> {found.state} by {event}"
        state = found.state
        assert found.attempts == attempts
        assert (outcome is not None) == state.terminal
        keys = StreamLane(lane)
        count = client.zcard(keys.delayed) + sum(map(client.xlen, keys.streams))
        assert count == 1 or (state.terminal and count <= 1)
    return state


def test_a_packed_message_is_what_celery_publishes(
    client: redis.Redis, settings: Settings, celery: Celery, lane: str
) -> None:
    queue = lane.removeprefix("stream:")
    task_id = str(uuid.uuid4())
    kwargs = {"inputs": {"text": "é"}, "version": 1}
    celery.send_task(
        "infer.m", kwargs=kwargs, queue=queue, task_id=task_id, priority=3, retries=1,
        expires=60,
    )  # fmt: skip
    (_, fields) = cast(Any, client.xrange(f"{lane}:3"))[0]
    theirs = json.loads(fields[b"message"])
    packed = TaskMessage(queue, "infer.m", task_id, kwargs, 3, None, 60, 1, "text: [1]")
    ours, again = (json.loads(Lanes(celery, client, settings).pack(packed)) for _ in range(2))
    assert again["properties"]["delivery_tag"] != ours["properties"]["delivery_tag"]
    for message in (theirs, ours):
        assert message["headers"].pop("expires")
        message["headers"].pop("argsrepr"), message["headers"].pop("kwargsrepr")
        assert message["properties"].pop("delivery_tag")
        # For results by RPC.
        message["properties"].pop("reply_to")
    # It is JSON already; Celery's default encodes it once more.
    assert ours["properties"].pop("body_encoding") == "utf-8"
    assert json.loads(base64.b64decode(theirs.pop("body"))) == json.loads(ours.pop("body"))
    # By its own exchange, which in Celery has the name of the queue, or by the default one.
    assert ours["properties"]["delivery_info"].pop("exchange") == ""
    theirs["properties"]["delivery_info"].pop("exchange")
    # `send_task` makes properties of all of its options, too.
    properties = theirs["properties"]
    theirs["properties"] = {name: properties[name] for name in ours["properties"]}
    assert ours == theirs
