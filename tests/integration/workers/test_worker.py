"""The worker process: what it reports to Celery, how it stops, and what it refuses to serve."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import Counter
from typing import Any

import pytest
from celery.result import AsyncResult

from inferno.errors import InfernoError
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import ROOT, command_path, wait_until
from tasks.state.cluster import Cluster
from tests.integration.conftest import occupied, reserved, send


def test_a_stopping_worker_loses_nothing_and_runs_nothing_twice(
    repository, start_worker, celery, records
):
    """The ledger of the model counts every row that was run, over both workers."""
    repository.add("drain", batching={"max_batch_size": 8, "max_batch_delay_ms": 5})
    texts = [f"sleep:0.01:{n}" for n in range(300)]
    stop_sending = threading.Event()
    tasks = {}

    def keep_sending():
        for text in texts:
            tasks[text] = send(celery, "drain", text)
        stop_sending.set()

    with start_worker("drain") as first:
        sender = threading.Thread(target=keep_sending)
        sender.start()
        wait_until(lambda: len(repository.ran()) > 20)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=20) == 0
    ran_by_first = len(repository.ran())
    sender.join()
    assert ran_by_first < len(texts)
    with start_worker("drain"):
        answers = {text: task.get(timeout=60) for text, task in tasks.items()}
    assert all(answers[text]["outputs"]["text"]["data"] == [text] for text in texts)
    assert Counter(repository.ran()) == Counter(texts)
    assert {records.fetch(task.id)[0].attempts for task in tasks.values()} == {1}


def test_a_full_batch_begins_shortly_before_the_pass_ahead_of_it_is_over(
    repository, start_worker, celery, submit, records
):
    repository.add("ahead", batching={"max_batch_size": 4})

    def has_begun(task_id: str) -> bool:
        record, _ = records.fetch(task_id)
        return record is not None and record.state is TaskState.RUNNING

    with start_worker("ahead"):
        # Teaches the worker that a pass takes 0.4 s, which is longer than AHEAD_S.
        send(celery, "ahead", "sleep:0.4").get(timeout=10)
        with occupied(celery, "ahead", repository):
            tasks = [submit("ahead", f"text {n}") for n in range(4)]
            wait_until(lambda: all(map(has_begun, tasks)))
            assert [text for text in repository.ran() if text.startswith("text")] == []
            # No second batch begins ahead.
            more = [submit("ahead", f"more {n}") for n in range(4)]
        results = [AsyncResult(task, app=celery).get(timeout=20) for task in tasks + more]
    assert {result["batch"]["size"] for result in results} == {4}
    assert {result["batch"]["flush_reason"] for result in results} == {"full"}
    assert [text for text in repository.ran() if text[:4] in ("text", "more")] == [
        *(f"text {n}" for n in range(4)),
        *(f"more {n}" for n in range(4)),
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_only_passes_run_on_the_cores_that_are_kept_for_them(repository, start_worker, celery):
    repository.add("cores")
    kept, *others = sorted(os.sched_getaffinity(0))

    def threads_there() -> int:
        threads = map(int, os.listdir(f"/proc/{worker.pid}/task"))
        return sum(os.sched_getaffinity(thread) == {kept} for thread in threads)

    with start_worker("cores", INFERNO_INFERENCE__CORES=str(kept)) as worker:
        # The thread of the event loop.
        assert os.sched_getaffinity(worker.pid) == set(others)
        with occupied(celery, "cores", repository):
            during = threads_there()
            assert during > 0
        # Threads that a pass starts stay there, such as that of the watchdog's timer.
        wait_until(lambda: threads_there() == during - 1)


def test_inspect_sees_the_members_of_batches(repository, start_worker, celery):
    repository.add("seen", batching={"max_batch_size": 4})
    with start_worker("seen"):
        with occupied(celery, "seen", repository) as wait_for:
            waiting = [send(celery, "seen", f"{n}") for n in range(6)]
            wait_for(6)
            assert {t["id"] for tasks in reserved(celery).values() for t in tasks} == {
                task.id for task in waiting
            }
            active = celery.control.inspect(timeout=1).active()
            assert [t["name"] for tasks in active.values() for t in tasks] == ["infer.seen"]
        for task in waiting:
            task.get(timeout=10)
        inspect = celery.control.inspect(timeout=1)
        (stats,) = inspect.stats().values()
        assert stats["total"] == {"infer.seen": 7}
        assert stats["prefetch_count"] == 12
        wait_until(lambda: not any(reserved(celery).values()))
        assert not any(inspect.active().values())


def test_each_member_sends_celery_s_events(repository, start_worker, celery):
    repository.add("events")
    seen: list[dict[str, Any]] = []
    with celery.connection() as connection:
        receiver = celery.events.Receiver(connection, handlers={"*": seen.append})
        listener = threading.Thread(target=lambda: receiver.capture(limit=None))
        listener.start()
        with start_worker("events"):
            wait_until(lambda: seen, what="the worker's own events")
            # One after the other: a transient error fails all members of a batch.
            good = send(celery, "events", "good")
            good.get(timeout=10)
            bad = send(celery, "events", "poison")
            with pytest.raises(InfernoError):
                bad.get(timeout=10)
            again = send(celery, "events", "once:e")
            again.get(timeout=10)

            def of(task):
                return [event["type"] for event in seen if event.get("uuid") == task.id]

            wait_until(lambda: [len(of(task)) for task in (good, bad, again)] == [3, 3, 6])
        receiver.should_stop = True
        listener.join(timeout=10)
    assert of(good) == ["task-received", "task-started", "task-succeeded"]
    assert of(bad) == ["task-received", "task-started", "task-failed"]
    # The next attempt may be fetched before the event of the first attempt is sent.
    once, twice = ["task-retried", "task-succeeded"], ["task-received", "task-started"]
    assert sorted(of(again)) == sorted(once + 2 * twice)


def test_a_worker_reports_itself_and_signs_off(repository, start_worker, client, settings):
    repository.add("report", 1)
    repository.add("report", 2)
    cluster = Cluster(client, settings)
    with start_worker("report"):
        (report,) = cluster.workers()
        assert report.state == "ready"
        assert report.models == {"report": [1, 2]}
        assert report.device in ("cpu", "cuda")
    assert Cluster(client, settings).workers() == []


def test_a_model_is_warm_before_its_worker_takes_tasks(repository, start_worker, celery):
    repository.add("cold", batching={"max_batch_size": 4})
    task = send(celery, "cold", "first")
    with start_worker("cold"):
        task.get(timeout=10)
    *before, last = repository.ledger.read_text().splitlines()
    # Batches of 1, 2 and 4 rows, each at least once
    assert set(before) == {"warm"}
    assert len(before) >= 1 + 2 + 4
    assert last == "first"


def test_a_worker_ends_when_a_model_hangs(repository, start_worker, celery, log):
    """The limit applies to each forward pass of tasks, not to their sum or to the warm-up."""
    repository.add(
        "hangs",
        timeout_s=1,
        batching={"max_batch_size": 1},
        warm_up={"inputs": {"text": "sleep:2.5"}},
    )
    with start_worker("hangs") as worker:
        send(celery, "hangs", ["sleep:0.3"] * 9).get(timeout=20)
        send(celery, "hangs", "sleep:600")
        assert worker.wait(timeout=30) == os.EX_SOFTWARE
    printed = log.read_text()
    assert "a forward pass of hangs version 1" in printed
    assert "has not ended within its limit of 1 s" in printed
    assert str(repository.root / "hangs" / "1" / "model.py") in printed, "the stack of the model"


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("unknown", [], "no model 'unknown'"),
        pytest.param("broken", [], "model.yaml: signature: field required", marks=pytest.mark.long),
        ("good", ["-P", "solo"], "engines need the pool `threads`"),
        pytest.param("good", ["--disable-prefetch"], "--disable-prefetch", marks=pytest.mark.long),
        pytest.param("good", ["--autoscale", "3,1"], "--autoscale", marks=pytest.mark.long),
        ("good,webhooks", [], "the queue webhooks needs a worker of its own"),
    ],
)
def test_a_worker_that_cannot_serve_says_why_in_one_line(repository, env, model, options, reason):
    repository.add("good")
    repository.add("broken")
    (repository.root / "broken" / "1" / "model.yaml").write_text("name: broken\nversion: 1\n")
    command = [command_path("celery"), "-A", "tasks", "worker", "-Q", model, *options]
    done = subprocess.run(command, cwd=ROOT, env={**ENV, **env}, capture_output=True, text=True)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


ENV = {"PATH": "/usr/bin:/bin"}
