"""Celery's own commands and clients on lanes, and ordinary Celery tasks on the same transport."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from inferno.errors import InvalidInput, TaskCancelled
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import ROOT, command_path, process, wait_until
from tasks.broker.lanes import Lanes
from tasks.state.cluster import Cluster
from tests.integration.conftest import occupied, send


@pytest.fixture
def tool(env):
    """Run a command of Celery and return its output."""

    def run(*arguments: str) -> str:
        command = [command_path("celery"), "-A", "tasks", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def lanes(celery, client, settings):
    return Lanes(celery, client, settings)


def test_inspect_tells_what_a_worker_does(repository, start_worker, celery, tool, client, settings):
    repository.add("inspected", batching={"max_batch_size": 4})
    with start_worker("inspected"), occupied(celery, "inspected", repository) as wait_for:
        waiting = [send(celery, "inspected", f"{n}") for n in range(2)]
        wait_for(2)

        (worker,) = Cluster(client, settings).workers()
        # With a destination, inspect returns as soon as that worker has answered.
        options = ["--json", "--timeout", "20", "--destination", worker.worker]

        def ask(question: str) -> Any:
            (answer,) = json.loads(tool("inspect", *options, *question.split())).values()
            return answer

        questions = ("ping", "active", "reserved", "stats", "active_queues", "registered")
        with ThreadPoolExecutor(2) as pool:
            answers = pool.map(ask, [*questions, f"query_task {waiting[0].id}"])
            ping, active, reserved, stats, queues, registered, query = answers
        assert ping == {"ok": "pong"}
        assert [task["name"] for task in active] == ["infer.inspected"]
        assert {task["id"] for task in reserved} == {task.id for task in waiting}
        assert stats["prefetch_count"] == 12
        assert stats["broker"]["transport"] == "redis-streams"
        assert [queue["name"] for queue in queues] == ["inspected"]
        assert registered == ["infer.inspected"]
        assert query[waiting[0].id][0] == "reserved"
    for task in waiting:
        task.get(timeout=10)


def test_a_worker_started_by_hand_shares_the_load(
    repository, start_worker, celery, env, tmp_path, client, settings
):
    repository.add("shared", batching={"max_batch_size": 1})
    cluster = Cluster(client, settings)
    command = [command_path("celery"), "-A", "tasks", "worker", "-Q", "shared"]
    with start_worker("shared"), occupied(celery, "shared", repository):
        with process(command, env, tmp_path / "by-hand.log"):
            wait_until(lambda: [w.state for w in cluster.workers()] == ["ready", "ready"])
            tasks = [send(celery, "shared", f"{n}") for n in range(10)]
            # The busy first worker may have fetched two tasks to run next.
            wait_until(lambda: sum(task.ready() for task in tasks) >= 8)
            results = [task.get() for task in tasks if task.ready()]
            by_hand = [w.label for w in cluster.workers() if w.worker.startswith("celery@")]
        assert {result["worker"] for result in results} == set(by_hand)


def test_events_dump_shows_each_task(repository, start_worker, celery, env, tmp_path):
    repository.add("dumped")
    log = tmp_path / "events.log"
    command = [command_path("celery"), "-A", "tasks", "events", "--dump"]
    with process(command, env, log), start_worker("dumped"):
        wait_until(lambda: "worker-online" in log.read_text() or "heartbeat" in log.read_text())
        task = send(celery, "dumped", "text")
        task.get(timeout=10)
        wait_until(lambda: "task succeeded" in log.read_text().lower())
    assert task.id in log.read_text()


def test_purge_empties_a_lane(celery, repository, lanes, tool):
    repository.add("purged")
    for n in range(3):
        send(celery, "purged", f"{n}")
    send(celery, "purged", "later", countdown=3600)
    assert "Purged 4 messages" in tool("purge", "-f", "-Q", "purged")
    assert lanes.backlog("purged").total == 0


def test_a_revoked_task_is_cancelled_wherever_it_waits(
    repository, start_worker, celery, records, tool
):
    repository.add("revoked", batching={"max_batch_size": 1})
    with start_worker("revoked"):
        with occupied(celery, "revoked", repository) as wait_for:
            held = send(celery, "revoked", "held by the worker")
            wait_for(1)
            in_lane = send(celery, "revoked", "in the lane")
            kept = send(celery, "revoked", "kept")
            tool("control", "revoke", held.id, in_lane.id)
        kept.get(timeout=10)
        for task in (held, in_lane):
            record, outcome = records.fetch(task.id)
            assert record.state is TaskState.CANCELLED
            assert isinstance(outcome.error, TaskCancelled)
            assert celery.AsyncResult(task.id).state == "REVOKED"
    assert repository.ran()[1:] == ["kept"]


def test_a_consumer_is_cancelled_and_added(repository, start_worker, celery, lanes, tool):
    repository.add("switched")
    with start_worker("switched"):
        send(celery, "switched", "before").get(timeout=10)
        tool("control", "cancel_consumer", "switched")
        task = send(celery, "switched", "meanwhile")
        assert json.loads(tool("inspect", "--json", "active_queues")).popitem()[1] == []
        assert lanes.backlog("switched").waiting == 1
        tool("control", "add_consumer", "switched")
        task.get(timeout=10)
    assert repository.ran() == ["before", "meanwhile"]


#: A client that knows nothing of Inferno; the test compares its output.
CLIENT = """
import sys
from celery import Celery, group
redis_url, gate, how = sys.argv[1:]
if how == "registered":
    import tasks.transport
    tasks.transport.register()
    app = Celery(broker=redis_url.replace("redis:", "redis-streams:"), backend=redis_url)
else:
    app = Celery(broker=redis_url, backend=redis_url)
    app.conf.broker_transport = "tasks.transport:Transport"

def infer(text, **options):
    return app.signature(
        "infer.foreign", kwargs={"inputs": {"text": text}}, queue="foreign", **options
    )

later = infer("later").apply_async(countdown=0.5)
late = infer("late").apply_async(expires=0.2)
first = infer("first").apply_async()
slow = infer("slow").apply_async(priority=0)
fast = infer("fast").apply_async(priority=9)
together = group(infer(f"member {n}") for n in range(3)).apply_async()
print(repr(late.get(timeout=10, propagate=False)))
open(gate, "w").close()
results = [first, slow, fast, later, *together]
print([result.get(timeout=20)["outputs"]["text"]["data"][0] for result in results])
"""


@pytest.mark.parametrize("how", ["registered", "by the name of the class"])
def test_a_foreign_client_uses_the_transport(repository, start_worker, celery, redis_url, how):
    repository.add("foreign", batching={"max_batch_size": 1})
    gate = repository.root.parent / "gate-foreign"
    with start_worker("foreign"), occupied(celery, "foreign", repository):
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, redis_url, str(gate), how],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    error, texts = done.stdout.splitlines()
    assert error.startswith("DeadlineExceeded(")
    members = [f"member {n}" for n in range(3)]
    assert eval(texts) == ["first", "slow", "fast", "later", *members]
    ran = repository.ran()[1:]
    assert Counter(ran) == Counter(["first", "slow", "fast", "later", *members])
    assert ran.index("fast") < ran.index("slow")


def test_what_should_follow_a_task_is_refused(repository, start_worker, celery):
    """A chain would end silently after the task, and a chord would wait forever."""
    repository.add("linked")
    signature = celery.signature(
        "infer.linked", kwargs={"inputs": {"text": "a"}}, queue="linked", immutable=True
    )
    with start_worker("linked"):
        with pytest.raises(InvalidInput, match="chain"):
            (signature | signature).apply_async().parent.get(timeout=10)
        with pytest.raises(InvalidInput, match="callbacks"):
            signature.apply_async(link=signature).get(timeout=10)
    assert repository.ran() == []


#: A Celery application that knows nothing of Inferno.
ORDINARY = """
import os, pathlib, signal, sys, time
from celery import Celery
from celery.exceptions import Reject
import tasks.transport
tasks.transport.register()
app = Celery("ordinary", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.task_default_queue = os.environ["QUEUE"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1)

def first_time(task_id):
    marker = pathlib.Path(os.environ["FOLDER"]) / task_id
    new = not marker.exists()
    marker.touch()
    return new

@app.task(bind=True)
def retried(self):
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)
    return self.request.retries

@app.task(bind=True)
def rejected(self):
    if first_time(self.request.id):
        raise Reject("not now", requeue=True)
    return self.request.delivery_info["redelivered"]

@app.task(bind=True)
def killed(self):
    if first_time(self.request.id):
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"

@app.task
def held(gate):
    while not os.path.exists(gate):
        time.sleep(0.01)
    return "released"
"""


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_ordinary_tasks_run_on_streams(pool, celery, redis_url, tmp_path, log):
    (tmp_path / "ordinary.py").write_text(ORDINARY)
    queue = f"ordinary-{pool}"
    env = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "BROKER": redis_url.replace("redis:", "redis-streams:"),
        "BACKEND": redis_url,
        "QUEUE": queue,
        "FOLDER": str(tmp_path),
    }

    def call(name: str, *args: Any, **options: Any):
        return celery.send_task(f"ordinary.{name}", args=args, queue=queue, **options)

    command = [
        command_path("celery"),
        "-A",
        "ordinary",
        "worker",
        "-P",
        pool,
        "-c",
        "2",
        "-l",
        "INFO",
    ]
    with process(command, env, log):
        wait_until(lambda: " ready." in log.read_text())
        assert call("retried").get(timeout=10) == 2
        assert call("rejected").get(timeout=10) is True
        if pool == "prefork":
            assert call("killed").get(timeout=20) == "survived"
        gate = tmp_path / "gate"
        busy = [call("held", str(gate)) for _ in range(2)]
        wait_until(lambda: all(f"[{task.id}] received" in log.read_text() for task in busy))
        revoked = call("retried")
        later = call("retried", countdown=0.3)
        revoked.revoke()
        wait_until(lambda: "revoked" in log.read_text())
        gate.touch()
        assert [task.get(timeout=10) for task in busy] == ["released"] * 2
        with pytest.raises(TaskRevokedError):
            revoked.get(timeout=10)
        assert later.get(timeout=10) == 2
