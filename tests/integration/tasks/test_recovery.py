"""What becomes of tasks when workers, or Redis, go down in the middle of them."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from subprocess import Popen
from typing import Any

import pytest
from celery.result import AsyncResult

from inferno import names
from inferno.errors import ForwardFailed, TaskNotFound, WorkerLost
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import wait_until
from tests.integration.conftest import occupied, reserved, send


def test_what_a_killed_worker_held_is_run_by_another_and_nothing_twice(
    repository, start_worker, celery, records
):
    """In its hands are a batch that runs, and others that wait for their turn."""
    repository.add("killed", batching={"max_batch_size": 4})
    with start_worker("killed") as victim:
        gate = repository.root.parent / "gate"
        running = [send(celery, "killed", f"hold:{gate}:{n}") for n in range(4)]
        wait_until(lambda: any(text.startswith("hold") for text in repository.ran()))
        waiting = [send(celery, "killed", f"{n}") for n in range(4)]
        with start_worker("killed"):
            # The second worker is idle: it has what the first does not hold, answered already.
            held = [task for task in running + waiting if not task.ready()]
            assert held
            victim.kill()
            killed_at = time.monotonic()
            gate.touch()
            for n in range(4):
                (repository.root.parent / f"gate:{n}").touch()
            for task in running + waiting:
                task.get(timeout=30)
            print(f"recovered after {time.monotonic() - killed_at:.1f} s")
    ran = Counter(repository.ran())
    assert all(ran[f"{n}"] == 1 for n in range(4))
    for task in running:
        record, outcome = records.fetch(task.id)
        assert outcome.succeeded
        assert record.attempts == ran[f"hold:{gate}:{running.index(task)}"]


def test_a_worker_that_holds_the_interpreter_is_alive(repository, start_worker, celery, records):
    """It answers nobody for far longer than anyone's patience with a dead one."""
    repository.add("locked")
    with start_worker("locked"):
        task = send(celery, "locked", "lock:6")
        wait_until(lambda: "lock:6" in repository.ran())
        with start_worker("locked"):
            task.get(timeout=30)
    assert repository.ran() == ["lock:6"]
    assert records.fetch(task.id)[0].attempts == 1


def test_a_worker_that_was_thought_dead_changes_nothing_when_it_returns(
    repository, start_worker, celery, records, client, settings, env
):
    env["INFERNO_WORKER__LEASE_S"] = "2"
    repository.add("stopped")
    gate = repository.root.parent / "gate"
    counters = names.counters_key(settings.redis.prefix)

    def stale() -> int:
        return int(client.hget(counters, "stale") or 0)

    before = stale()
    with start_worker("stopped") as first:
        task = send(celery, "stopped", f"hold:{gate}")
        wait_until(lambda: repository.ran())
        first.send_signal(signal.SIGSTOP)
        env["INFERNO_WORKER__LEASE_S"] = "60"
        with start_worker("stopped") as second:
            # The second takes it over when the first one's lease is over.
            wait_until(lambda: len(repository.ran()) == 2)
            # While it runs the task, the first one comes back with an outcome.
            second.send_signal(signal.SIGSTOP)
            first.send_signal(signal.SIGCONT)
            gate.touch()
            wait_until(lambda: stale() == before + 1)
            assert not task.ready()
            second.send_signal(signal.SIGCONT)
            result = task.get(timeout=30)
        record, _ = records.fetch(task.id)
    assert record.attempts == 2
    assert result["batch"]["id"] == record.batch_id


def test_a_task_that_kills_its_worker_dies_alone(
    repository, start_worker, celery, dead, replay, records
):
    """31 results, one dead letter after three attempts; mended, its replay succeeds."""
    repository.add("deadly", batching={"max_batch_size": 32})
    texts = [f"text {n}" for n in range(32)]
    texts[13] = "kill"
    with start_worker("deadly"):
        with occupied(celery, "deadly", repository) as wait_for:
            tasks = [send(celery, "deadly", text) for text in texts]
            wait_for(32)
        deadly = tasks.pop(13)
        kills = 1
        while not deadly.ready():
            with start_worker("deadly") as worker:
                wait_until(partial(ended, worker, deadly), 30)
                kills += worker.poll() is not None
    assert kills == 3
    with start_worker("deadly"):
        answers = [task.get(timeout=30)["outputs"]["text"]["data"][0] for task in tasks]
        assert answers == [text for text in texts if text != "kill"]
        with pytest.raises(WorkerLost, match="during 3 forward passes"):
            deadly.get(timeout=5)
        record, _ = records.fetch(deadly.id)
        assert (record.state, record.attempts) == (TaskState.FAILED, 3)
        letter = dead.show(deadly.id)
        assert letter.code == "worker_lost"
        assert letter.batch_id == record.batch_id
        assert letter.payload["inputs"] == {"text": "kill"}
        repository.mended.touch()
        again = replay.replay(letter)
        assert replay.replay(letter).task_id == again.task_id
        wait_until(lambda: records.fetch(again.task_id)[1])
        record, outcome = records.fetch(again.task_id)
    assert outcome.succeeded
    assert record.replay_of == deadly.id
    with pytest.raises(TaskNotFound):
        dead.show(deadly.id)


def ended(worker: Popen[bytes], task: AsyncResult) -> bool:
    return worker.poll() is not None or task.ready()


def test_a_delay_outlives_every_worker(repository, start_worker, celery, records, client):
    retries = {"max_retries": 1, "backoff_s": 4, "jitter": False}
    repository.add("delayed", retries=retries)
    with start_worker("delayed"):
        task = send(celery, "delayed", "once:d")
        wait_until(lambda: client.zcard("stream:delayed:delayed"))
    record, _ = records.fetch(task.id)
    assert (record.state, record.retries) == (TaskState.RETRYING, 1)
    with start_worker("delayed"):
        task.get(timeout=30)
    record, _ = records.fetch(task.id)
    assert record.started_at >= record.retry_at
    assert repository.ran() == ["once:d", "once:d"]


def test_a_task_out_of_retries_is_a_dead_letter(repository, start_worker, celery, dead):
    repository.add("spent")
    with start_worker("spent"):
        task = send(celery, "spent", "never")
        with pytest.raises(ForwardFailed, match="never"):
            task.get(timeout=30)
    letter = dead.show(task.id)
    assert letter.retries == 2
    assert "Transient: never" in letter.traceback
    outline = replace(letter, traceback="", payload={})
    assert dead.newest(10, lambda found: found.model == "spent").items == [outline]
    dead.discard(task.id)
    with pytest.raises(TaskNotFound):
        dead.discard(task.id)


@pytest.mark.parametrize("setting", ["maxmemory", "min-replicas-to-write"])
def test_outcomes_wait_for_a_redis_that_refuses_writes(
    repository, start_worker, celery, client, setting
):
    repository.add("patient")
    gate = repository.root.parent / "gate"
    with ExitStack() as stack:
        worker = stack.enter_context(start_worker("patient"))
        task = send(celery, "patient", f"hold:{gate}")
        wait_until(lambda: repository.ran())
        client.config_set(setting, 1)
        stack.callback(client.config_set, setting, 0)
        gate.touch()
        log = repository.root.parent / "process.log"
        wait_until(lambda: "Redis does not accept outcomes" in log.read_text())
        assert not task.ready()
        client.config_set(setting, 0)
        task.get(timeout=30)
        assert send(celery, "patient", "next").get(timeout=30)
        assert worker.poll() is None
    assert repository.ran() == [f"hold:{gate}", "next"]


def test_a_hanging_forward_pass_ends_its_worker_and_is_a_suspect(
    repository, start_worker, celery, records, env
):
    repository.add("hanging", timeout_s=2)
    gate = repository.root.parent / "gate"
    with start_worker("hanging") as worker:
        task = send(celery, "hanging", f"hold:{gate}")
        assert worker.wait(timeout=30) == 70
    gate.touch()
    with start_worker("hanging"):
        task.get(timeout=30)
    assert records.fetch(task.id)[0].attempts == 2


def test_urgent_tasks_leave_first_also_out_of_the_buffer(repository, start_worker, celery):
    repository.add("urgent", batching={"max_batch_size": 4})
    with start_worker("urgent"):
        with occupied(celery, "urgent", repository) as wait_for:
            tasks = [send(celery, "urgent", f"{p}", priority=p) for p in (0, 5, 9, 0)]
            wait_for(4)
        for task in tasks:
            task.get(timeout=20)
    assert repository.ran()[1:] == ["9", "5", "0", "0"]


def test_a_stopping_worker_gives_back_at_once_what_waits(repository, start_worker, celery):
    """Its own batch may take long; others run what would have come after it."""
    repository.add("leaving")
    with start_worker("leaving") as first:
        gate = repository.root.parent / "gate-leaving"
        busy = send(celery, "leaving", f"hold:{gate}")
        wait_until(lambda: repository.ran())
        waiting = [send(celery, "leaving", f"{n}") for n in range(8)]
        wait_until(lambda: sum(map(len, reserved(celery).values())) == 8)
        with start_worker("leaving"):
            first.send_signal(signal.SIGTERM)
            for task in waiting:
                task.get(timeout=20)
            assert not busy.ready()
            gate.touch()
            busy.get(timeout=20)
            assert first.wait(timeout=20) == 0
    assert Counter(repository.ran()).most_common(1)[0][1] == 1


def test_delays_follow_the_formula(repository, start_worker, celery, records):
    """Celery's exponential backoff: 0.1 s times 2 to the power of the retry, at most 0.3 s."""
    policy = {"max_retries": 4, "backoff_s": 0.1, "max_backoff_s": 0.3, "jitter": False}
    repository.add("backoff", retries=policy)
    events: list[dict[str, Any]] = []
    with celery.connection() as connection:
        receiver = celery.events.Receiver(connection, handlers={"task-retried": events.append})
        listener = threading.Thread(target=partial(receiver.capture, limit=None))
        listener.start()
        with start_worker("backoff"):
            task = send(celery, "backoff", "never")
            with pytest.raises(ForwardFailed):
                task.get(timeout=30)
            wait_until(lambda: len(events) == 4)
        receiver.should_stop = True
        listener.join(timeout=10)
    delays = [event["exception"].split("next attempt in ")[1] for event in events]
    assert delays == ["0.1 s", "0.2 s", "0.3 s", "0.3 s"]
    record, _ = records.fetch(task.id)
    assert (record.attempts, record.retries) == (5, 4)
    assert record.started_at >= record.retry_at
