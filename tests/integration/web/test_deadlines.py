"""The thread that ends late tasks."""

from __future__ import annotations

import time

import pytest

from inferno.errors import BrokerUnavailable
from inferno.protocol.tasks import TaskState
from tasks.control.deadlines import Deadlines
from tasks.control.tasks import Control
from tasks.results.bridge import Waiter

LATE = {"model": "sentiment", "inputs": {"text": "Late."}, "timeout_ms": 1}


@pytest.fixture
def here(app):
    return app.extensions["inferno"].gateway


def test_deadline_is_enforced_when_redis_is_back(client, here, monkeypatch):
    task_id = client.post("/infer", json=LATE).json["task_id"]
    expire, tries = Control.expire, []

    def away_at_first(control, record):
        tries.append(record.task_id)
        if len(tries) == 1:
            raise BrokerUnavailable("it is away")
        return expire(control, record)

    monkeypatch.setattr(Control, "expire", away_at_first)
    monkeypatch.setattr(Deadlines, "RETRY_S", 0.01)
    with Waiter(here.bridge, task_id) as waiter:
        here.deadlines.watch(task_id, time.time())
        outcome = waiter.wait(20)
    assert outcome is not None
    assert not outcome.succeeded
    assert tries == [task_id] * 2


def test_task_that_nobody_waits_for_is_left_alone(client, here, records):
    left, awaited = (client.post("/infer", json=LATE).json["task_id"] for _ in range(2))
    with Waiter(here.bridge, awaited) as waiter:
        here.deadlines.watch(left, time.time() - 1)
        here.deadlines.watch(awaited, time.time())
        assert waiter.wait(20)
    assert records.fetch(left)[0].state is TaskState.QUEUED


def test_deadlines_that_nobody_waits_for_do_not_pile_up(here):
    for number in range(5 * Deadlines.KEPT):
        here.deadlines.watch(f"task-{number}", time.time() + 3600)
    assert len(here.deadlines._due) <= Deadlines.KEPT + 1
