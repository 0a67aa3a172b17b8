"""One worker process, a real Redis, and clients that speak plain Celery."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery.result import AsyncResult

from inferno.errors import (
    DeadlineExceeded,
    ForwardFailed,
    InfernoError,
    InvalidInput,
    ModelNotFound,
)
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import wait_until
from tasks.broker.lanes import Lanes, TaskMessage
from tests.integration.conftest import BROKERS, occupied, send


@pytest.fixture(params=BROKERS)
def broker(request):
    """Each test runs on each kind of broker: there is nothing here that one of them cannot do."""
    return request.param


#: What happens within a batch is the same on every broker; `make test` tries it on one.
within_a_batch = pytest.mark.parametrize(
    "broker", ["streams", *(pytest.param(kind, marks=pytest.mark.long) for kind in BROKERS[1:])]
)


def test_any_celery_client_gets_values_and_errors(repository, start_worker, celery):
    repository.add("plain")
    with start_worker("plain"):
        result = send(celery, "plain", "hello").get(timeout=10)
        assert result["outputs"] == {"text": {"dtype": "string", "shape": [1], "data": ["hello"]}}
        assert result["model"] == "plain"
        assert result["version"] == 1
        assert result["batch"]["size"] == 1
        assert re.fullmatch("[0-9a-f]{8}", result["worker"])
        assert set(result["timings"]) == {"queue_ms", "batch_wait_ms", "inference_ms", "total_ms"}
        assert result["timings"]["total_ms"] >= result["timings"]["inference_ms"] >= 0

        with pytest.raises(InvalidInput, match="Missing required input"):
            celery.send_task("infer.plain", kwargs={"inputs": {}}, queue="plain").get(timeout=10)
        with pytest.raises(InvalidInput, match="keyword argument `inputs`"):
            celery.send_task("infer.plain", queue="plain").get(timeout=10)
        with pytest.raises(ModelNotFound, match="no version 7"):
            celery.send_task(
                "infer.plain", kwargs={"inputs": {"text": "a"}, "version": 7}, queue="plain"
            ).get(timeout=10)
        with pytest.raises(ForwardFailed, match="poisonous"):
            send(celery, "plain", "poison").get(timeout=10)


def test_a_plain_script_in_another_process_reads_the_result(
    repository, start_worker, celery, redis_url
):
    repository.add("script")
    with start_worker("script"):
        task_id = send(celery, "script", "from afar").id
        code = (
            "from celery import Celery; from celery.result import AsyncResult;"
            f"app = Celery(broker={redis_url!r}, backend={redis_url!r});"
            f"print(AsyncResult({task_id!r}, app=app).get(timeout=10)['outputs']['text']['data'])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "['from afar']", done.stderr


@within_a_batch
def test_tasks_that_arrive_during_a_forward_pass_share_the_next_one(
    repository, start_worker, celery
):
    repository.add("crowd", batching={"max_batch_size": 16, "max_batch_delay_ms": 5})
    with start_worker("crowd"):
        with occupied(celery, "crowd", repository) as wait_for:
            crowd = [send(celery, "crowd", f"text {n}") for n in range(16)]
            wait_for(16)
        results = [task.get(timeout=20) for task in crowd]
    assert {result["batch"]["size"] for result in results} == {16}
    assert {result["batch"]["flush_reason"] for result in results} == {"full"}
    assert min(result["batch"]["predicted_ms"] for result in results) > 0
    assert min(result["batch"]["run_ms"] for result in results) > 0
    assert [r["outputs"]["text"]["data"] for r in results] == [[f"text {n}"] for n in range(16)]


@within_a_batch
def test_a_bad_member_fails_alone(repository, start_worker, celery):
    repository.add("bad", batching={"max_batch_size": 32})
    with start_worker("bad"):
        texts = [f"text {n}" for n in range(32)]
        texts[13] = "poison"
        with occupied(celery, "bad", repository) as wait_for:
            tasks = [send(celery, "bad", text) for text in texts]
            wait_for(32)
        outcomes = [task.get(timeout=20, propagate=False) for task in tasks]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert len(failed) == 1
    assert isinstance(outcomes[13], ForwardFailed)
    answers = [o["outputs"]["text"]["data"][0] for n, o in enumerate(outcomes) if n != 13]
    assert answers == [text for text in texts if text != "poison"]


@within_a_batch
def test_members_with_odd_errors_fail_alone(repository, start_worker, celery):
    """One ends its thread, the text of one cannot be written, and one has no text at all."""
    repository.add("odd", batching={"max_batch_size": 8})
    with start_worker("odd"):
        texts = ["good", "exit", "fine", "unwritable", "mute", "well"]
        with occupied(celery, "odd", repository) as wait_for:
            tasks = [send(celery, "odd", text) for text in texts]
            wait_for(len(tasks))
        outcomes = [task.get(timeout=20, propagate=False) for task in tasks]
    assert [str(outcome) for outcome in outcomes if isinstance(outcome, ForwardFailed)] == [
        "odd failed: RuntimeError: its code raised SystemExit",
        "odd failed: RuntimeError: half of a pair: \\ud800",
        "odd failed: Mute: (its text cannot be read: ValueError)",
    ]
    answers = [outcome["outputs"]["text"]["data"][0] for outcome in outcomes[::2][:2]]
    assert [*answers, outcomes[5]["outputs"]["text"]["data"][0]] == ["good", "fine", "well"]


@within_a_batch
def test_a_batch_too_large_for_memory_is_halved(repository, start_worker, celery):
    repository.add(
        "memory",
        parameters={"ledger": str(repository.ledger), "memory": 8},
        batching={"max_batch_size": 16},
    )
    with start_worker("memory"):
        with occupied(celery, "memory", repository) as wait_for:
            tasks = [send(celery, "memory", f"text {n}") for n in range(16)]
            wait_for(16)
        results = [task.get(timeout=20) for task in tasks]
    assert {result["batch"]["size"] for result in results} == {8}


@within_a_batch
def test_a_task_of_many_rows_is_split_and_joined(repository, start_worker, celery):
    repository.add("rows", batching={"max_batch_size": 4})
    texts = [f"row {n}" for n in range(10)]
    with start_worker("rows"):
        result = send(celery, "rows", texts).get(timeout=10)
    assert result["outputs"]["text"] == {"dtype": "string", "shape": [10], "data": texts}
    assert repository.ran() == texts


@within_a_batch
def test_versions_never_share_a_batch(repository, start_worker, celery):
    repository.add("versions", 1)
    repository.add("versions", 2)
    with start_worker("versions"):
        with occupied(celery, "versions", repository) as wait_for:
            tasks = [
                celery.send_task(
                    "infer.versions",
                    kwargs={"inputs": {"text": f"{n}"}, "version": 1 + n % 2},
                    queue="versions",
                )
                for n in range(10)
            ]
            wait_for(10)
        results = [task.get(timeout=20) for task in tasks]
    assert [result["version"] for result in results] == [1, 2] * 5
    assert {result["batch"]["size"] for result in results} == {5}
    assert len({result["batch"]["id"] for result in results}) == 2


@within_a_batch
def test_an_expired_task_is_dropped_while_the_executor_is_busy(
    repository, start_worker, celery, records
):
    repository.add("late")
    with start_worker("late"), occupied(celery, "late", repository):
        late = send(celery, "late", "too late", expires=0.3)
        with pytest.raises(DeadlineExceeded):
            late.get(timeout=10)
        _, outcome = records.fetch(late.id)
        assert isinstance(outcome.error, DeadlineExceeded)
    assert "too late" not in repository.ran()


def test_a_transient_error_is_tried_again_and_counted(repository, start_worker, celery, records):
    repository.add("retry")
    with start_worker("retry"):
        once = send(celery, "retry", "once:a")
        assert once.get(timeout=20)["outputs"]["text"]["data"] == ["once:a"]
        never = send(celery, "retry", "never")
        with pytest.raises(ForwardFailed, match="never"):
            never.get(timeout=20)
    assert repository.ran().count("once:a") == 2
    assert repository.ran().count("never") == 3
    assert records.fetch(once.id)[0].attempts == 2
    assert records.fetch(never.id)[0].attempts == 3


def test_a_second_delivery_of_a_finished_task_is_not_run(repository, start_worker, celery, broker):
    repository.add("twice")
    with start_worker("twice"):
        first = send(celery, "twice", "again").get(timeout=10)
        task = send(celery, "twice", "again", task_id=f"the-same-on-{broker}")
        task.get(timeout=10)
        send(celery, "twice", "again", task_id=f"the-same-on-{broker}")
        send(celery, "twice", "last").get(timeout=10)
    assert first["outputs"]["text"]["data"] == ["again"]
    assert repository.ran() == ["again", "again", "last"]


def test_a_task_in_the_future_waits_without_holding_others_up(
    repository, start_worker, celery, records
):
    repository.add("future")
    with start_worker("future"):
        # More than the worker may hold.
        for n in range(100):
            send(celery, "future", f"tomorrow {n}", countdown=86_400)
        sent_at = time.time()
        soon = send(celery, "future", "soon", countdown=1)
        send(celery, "future", "now").get(timeout=20)
        soon.get(timeout=20)
    assert repository.ran() == ["now", "soon"]
    record, _ = records.fetch(soon.id)
    assert record.started_at >= sent_at + 1


def test_the_urgent_overtake_the_others(repository, start_worker, celery, client, settings, broker):
    repository.add("urgent", batching={"max_batch_size": 1})
    lanes = Lanes(celery, client, settings)

    def publish(text: str, priority: int) -> AsyncResult:
        kwargs = {"inputs": {"text": text}}
        lanes.send(TaskMessage("urgent", "infer.urgent", f"{broker} {text}", kwargs, priority))
        return celery.AsyncResult(f"{broker} {text}")

    with start_worker("urgent"):
        with occupied(celery, "urgent", repository) as wait_for:
            # What is in the worker's hands is overtaken in its own way; the others in the lane.
            tasks = [publish("first", 0), publish("second", 0)]
            wait_for(2)
            tasks += [publish(f"slow {n}", 0) for n in range(3)] + [publish("fast", 9)]
        for task in tasks:
            task.get(timeout=10)
    ran = repository.ran()[1:]
    assert ran.index("fast") < ran.index("slow 0")
    ran.remove("fast")
    assert ran == ["first", "second", "slow 0", "slow 1", "slow 2"]


@within_a_batch
def test_a_record_outlives_its_result(repository, start_worker, celery, records, client):
    repository.add("record")
    with start_worker("record"):
        task = send(celery, "record", "x")
        task.get(timeout=10)
    record, outcome = records.fetch(task.id)
    assert record.state is TaskState.SUCCEEDED
    assert record.model == "record"
    assert record.attempts == 1
    assert record.accepted_at <= record.started_at <= record.finished_at
    assert outcome.succeeded
    assert 0 < client.ttl(f"celery-task-meta-{task.id}") < client.ttl(f"inferno:task:{task.id}")


# Celery's lists may lose what is on its way just then; see docs/brokers.md.
@pytest.mark.parametrize("broker", ["streams", "amqp"])
def test_a_cut_connection_loses_nothing(repository, start_worker, celery, client):
    repository.add("cut", batching={"max_batch_size": 8})
    with start_worker("cut"), ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [send(celery, "cut", f"sleep:0.01:{n}") for n in range(200)])
        wait_until(lambda: len(repository.ran()) > 20)
        for connection in client.client_list():
            # Not those of this test.
            if connection["cmd"] in ("brpop", "evalsha", "exec"):
                client.execute_command("CLIENT", "KILL", "ID", connection["id"])
        tasks = sending.result()
        results = [task.get(timeout=60) for task in tasks]
    assert [r["outputs"]["text"]["data"][0] for r in results] == [
        f"sleep:0.01:{n}" for n in range(200)
    ]


def test_odd_messages_end_no_worker(repository, start_worker, celery):
    """Any Celery client can send anything."""
    repository.add("odd", retries={"max_retries": 1, "backoff_s": 0.1})
    with start_worker("odd") as process:
        for accepted_at in ("abc", "nan", [1]):
            odd: dict[str, object] = {"inputs": {"text": "fine"}, "accepted_at": accepted_at}
            celery.send_task("infer.odd", kwargs=odd, queue="odd").get(timeout=10)
        for name, value in (("outputs", 5), ("version", "x"), ("webhook", 1)):
            odd = {"inputs": {"text": "refused"}, name: value}
            with pytest.raises(InfernoError):
                celery.send_task("infer.odd", kwargs=odd, queue="odd").get(timeout=10)
        again = send(celery, "odd", "once:odd", priority=20)
        assert again.get(timeout=20)["outputs"]["text"]["data"] == ["once:odd"]
        assert process.poll() is None
    assert "refused" not in repository.ran()


LEAKY = """
import numpy as np

def build(context):
    def run(inputs):
        if "warm" not in inputs["text"]:
            open(context.path / "missing" / "weights.bin")
        return {"text": inputs["text"]}

    return run
"""


def test_callers_are_not_told_paths_of_the_machine(repository, start_worker, celery):
    repository.add("leaky", code=LEAKY)
    with start_worker("leaky"), pytest.raises(ForwardFailed) as raised:
        send(celery, "leaky", "x").get(timeout=10)
    assert "No such file or directory: 'weights.bin'" in raised.value.detail
    assert str(repository.root) not in raised.value.detail
