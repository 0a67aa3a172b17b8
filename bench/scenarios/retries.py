"""How are failed jobs retried and monitored?

In a copy of `mock`, a fifth of the forward passes fail with a transient error. Their tasks are
tried again after a delay; tasks that fail each time leave dead letters, which are replayed at the
end.
The scenario watches as an operator would: by Celery's events, which show each attempt, and by
`GET /lanes`, `/tasks` and `/dead`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from celery import Celery

from bench.scenarios.packages import add_mock
from inferno.client import Client
from inferno.settings import Settings
from inferno.testing.platform import running
from inferno.testing.processes import wait_until
from tasks.transport import register

QUESTION = "How are failed jobs retried and monitored?"

MODEL = "flaky"
TASKS = 300
#: Submits a second: few enough that batches stay small, and most tasks fail independently.
RATE_PER_S = 100.0
FAILURE_PERCENT = 20.0
#: Small batches, because tasks that share a failed pass are tried again together.
BATCHING = {"max_batch_size": 4}
RETRIES = {"max_retries": 2, "backoff_s": 0.5, "max_backoff_s": 2.0}
#: Interval between two looks at the lane, in seconds.
LOOK_S = 0.1
#: Limit for the last tasks to end, in seconds.
PATIENCE_S = 30.0
#: Kinds of events, by the names of Celery's events.
KINDS = {
    "task-started": "started",
    "task-retried": "retried",
    "task-succeeded": "succeeded",
    "task-failed": "failed",
}
#: Kinds that end a task.
ENDS = ("succeeded", "failed")


def measure(folder: Path, tasks: int = TASKS) -> dict[str, Any]:
    """Submit tasks to a failing model, and watch them until they end.

    Args:
      folder: empty folder for the platform's files.
      tasks: number of tasks.
    Returns:
      `events`, each with `at_s`, `kind` and the number of the `task`; `looks`, each with `at_s` and
      the numbers of `delayed` tasks and `dead` letters; the numbers of tasks by `attempts` and by
      their final state (`ends`); the numbers of letters by error (`dead_errors`) and by the final
      state of their replays (`replayed`).
    """
    add_mock(
        folder / "models",
        MODEL,
        parameters={"failure_percent": FAILURE_PERCENT},
        batching=BATCHING,
        retries=RETRIES,
    )
    env = {"INFERNO_REPOSITORY__ROOT": str(folder / "models")}
    with running(folder, env, "--no-flower") as platform, Client(platform.url) as client:
        with _captured(platform.redis_url) as events:
            began = time.time()
            numbers: dict[str, int] = {}
            submitting = Thread(target=_submit, args=(platform.url, tasks, numbers))
            submitting.start()
            looks: list[dict[str, Any]] = []
            while not looks or submitting.is_alive() or _ended(events) < tasks:
                lane, dead = client.lane(MODEL), client.count_dead_letters()
                at_s = time.time() - began
                looks.append({"at_s": round(at_s, 3), "delayed": lane["delayed"], "dead": dead})
                if at_s > tasks / RATE_PER_S + PATIENCE_S:
                    raise TimeoutError(f"only {_ended(events)} of {tasks} tasks have ended")
                time.sleep(LOOK_S)
        views = list(client.tasks(model=MODEL))
        letters = list(client.dead_letters(model=MODEL))
        again = {client.replay(letter["task_id"]).id for letter in letters}
        wait_until(lambda: all(client.task(task_id, 30)["finished_at"] for task_id in again), 60)
        replayed = [client.task(task_id)["status"] for task_id in again]
    return {
        "tasks": tasks,
        "failure_percent": FAILURE_PERCENT,
        "retries": RETRIES,
        "events": [
            {
                "at_s": round(event["timestamp"] - began, 3),
                "kind": KINDS[event["type"]],
                "task": numbers[event["uuid"]],
            }
            for event in sorted(events, key=lambda event: float(event["timestamp"]))
        ],
        "looks": looks,
        "attempts": _counted(view["attempts"] for view in views),
        "ends": _counted(view["status"] for view in views),
        "dead_errors": _counted(letter["error"]["detail"] for letter in letters),
        "replayed": _counted(replayed),
    }


@contextmanager
def _captured(redis_url: str) -> Iterator[list[dict[str, Any]]]:
    """Collect Celery's task events until the block ends, as Flower does."""
    register()
    events: list[dict[str, Any]] = []
    heard = Event()

    def note(event: dict[str, Any]) -> None:
        heard.set()
        if event["type"] in KINDS:
            events.append(event)

    with (
        Celery(broker=Settings(redis={"url": redis_url}).broker_url) as celery,
        celery.connection_for_read() as connection,
    ):
        receiver = celery.events.Receiver(connection, handlers={"*": note})
        listening = Thread(target=receiver.capture, kwargs={"wakeup": False})
        listening.start()
        try:
            # Workers send a heartbeat event every two seconds.
            wait_until(heard.is_set, what="an event of a worker")
            yield events
        finally:
            receiver.should_stop = True
            listening.join()


def _submit(url: str, tasks: int, numbers: dict[str, int]) -> None:
    """Submit at a fixed rate; store the number of each task by its id."""
    began = time.perf_counter()
    with Client(url) as client:
        for n in range(tasks):
            time.sleep(max(began + n / RATE_PER_S - time.perf_counter(), 0))
            numbers[client.submit(MODEL, f"task {n}").id] = n


def _ended(events: list[dict[str, Any]]) -> int:
    return sum(KINDS[event["type"]] in ENDS for event in list(events))


def _counted(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def answer(document: dict[str, Any]) -> list[str]:
    """Summarise what became of the tasks."""
    dead, replayed = document["ends"].get("failed", 0), document["replayed"]
    failed_once = len({e["task"] for e in document["events"] if e["kind"] in ("retried", "failed")})
    attempts = sum(event["kind"] == "started" for event in document["events"])
    took = ", ".join(f"{count} took {n}" for n, count in document["attempts"].items())
    return [
        f"{failed_once} of {document['tasks']} tasks failed; retries saved all but {dead} of them.",
        f"Attempts: {took}. {dead} were given up and left dead letters; replayed, "
        f"{replayed.get('succeeded', 0)} of these succeeded.",
        f"Celery's events showed each of the {attempts} attempts, and the lane every task that "
        "waited for its next one.",
    ]
