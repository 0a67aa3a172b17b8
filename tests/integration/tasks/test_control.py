"""Cancelling, purging, pausing, replaying, with real workers; the model's ledger tells who ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from inferno.errors import NotConfirmed, PayloadGone, TaskCancelled, TaskNotFound, WrongState
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import wait_until
from tasks.control.tasks import Control
from tasks.state.records import Records
from tests.integration.conftest import occupied, send

#: So long that nobody waits for it.
LONG_PAUSE = {"max_retries": 1, "backoff_s": 600, "max_backoff_s": 600, "jitter": False}


@pytest.fixture
def state(records: Records) -> Callable[[str], TaskState | None]:
    """Return where a task stands."""

    def state(task_id: str) -> TaskState | None:
        record, _ = records.fetch(task_id)
        return record.state if record else None

    return state


def assert_cancelled(records: Records, task_id: str) -> None:
    record, outcome = records.fetch(task_id)
    assert record is not None
    assert record.state is TaskState.CANCELLED
    assert outcome is not None
    assert isinstance(outcome.error, TaskCancelled)


def test_task_in_its_lane_is_cancelled_and_never_runs(
    repository, start_worker, records, control, submit, state
):
    repository.add("lane")
    gone, stays = submit("lane", "gone"), submit("lane", "stays")
    control.cancel(gone)
    control.cancel(gone)
    assert control.lanes.backlog("lane").total == 1
    with start_worker("lane"):
        wait_until(lambda: state(stays) is TaskState.SUCCEEDED)
    assert repository.ran() == ["stays"]
    assert_cancelled(records, gone)
    with pytest.raises(WrongState, match="succeeded"):
        control.cancel(stays)
    with pytest.raises(TaskNotFound):
        control.cancel("nobody")


def test_task_in_a_worker_s_buffer_is_cancelled_and_never_runs(
    repository, start_worker, celery, records, control, submit, state
):
    repository.add("buffer", batching={"max_batch_size": 4})
    with start_worker("buffer"):
        with occupied(celery, "buffer", repository) as wait_for:
            gone, stays = submit("buffer", "gone"), submit("buffer", "stays")
            wait_for(2)
            control.cancel(gone)
            assert_cancelled(records, gone)
        wait_until(lambda: state(stays) is TaskState.SUCCEEDED)
        # Its place is free again: the worker takes as many tasks as ever.
        for n in range(20):
            send(celery, "buffer", f"later {n}").get(timeout=10)
        wait_until(lambda: control.lanes.backlog("buffer").total == 0)
    assert "gone" not in repository.ran()
    assert_cancelled(records, gone)


def test_task_that_waits_for_a_retry_is_cancelled_and_leaves_nothing(
    repository, start_worker, records, control, submit, state
):
    repository.add("retry", retries=LONG_PAUSE)
    with start_worker("retry"):
        task_id = submit("retry", "once:r")
        wait_until(lambda: state(task_id) is TaskState.RETRYING)
        assert control.lanes.backlog("retry").delayed == 1
        control.cancel(task_id)
    assert control.lanes.backlog("retry").total == 0
    assert repository.ran() == ["once:r"]
    assert_cancelled(records, task_id)


def test_result_of_a_running_task_that_is_cancelled_is_discarded(
    repository, start_worker, celery, records, control, submit, tmp_path
):
    repository.add("running")
    gate = tmp_path / "gate"
    with start_worker("running"):
        task_id = submit("running", f"hold:{gate}")
        wait_until(repository.ran)
        control.cancel(task_id)
        assert_cancelled(records, task_id)
        gate.touch()
        send(celery, "running", "next").get(timeout=10)
        wait_until(lambda: control.lanes.backlog("running").total == 0)
    assert_cancelled(records, task_id)


def test_payload_of_a_cancelled_task_can_be_kept(
    repository, start_worker, celery, client, settings, control, replay, submit, state
):
    repository.add("kept", retries=LONG_PAUSE)
    lost = submit("kept", "lost")
    control.cancel(lost)
    with pytest.raises(PayloadGone):
        replay.retry(lost)
    tasks = settings.tasks.model_copy(update={"keep_payloads": "failed"})
    keeping = Control(celery, client, settings.model_copy(update={"tasks": tasks}))
    waiting = submit("kept", "waiting")
    keeping.cancel(waiting)
    with start_worker("kept"):
        retrying = submit("kept", "once:k")
        wait_until(lambda: state(retrying) is TaskState.RETRYING)
        keeping.cancel(retrying)
        again = [replay.retry(waiting).task_id, replay.retry(retrying).task_id]
        wait_until(lambda: {state(task_id) for task_id in again} == {TaskState.SUCCEEDED})
    assert sorted(repository.ran()) == ["once:k", "once:k", "waiting"]


def test_task_that_is_given_up_leaves_a_letter_and_is_replayed(
    repository, start_worker, records, control, dead, replay, submit, state, tmp_path
):
    repository.add("dies", retries={"max_retries": 1, "backoff_s": 0.1})
    healed = tmp_path / "healed"
    with start_worker("dies"):
        task_id = submit("dies", f"until:{healed}")
        wait_until(lambda: state(task_id) is TaskState.FAILED)
        record, _ = records.fetch(task_id)
        assert (record.attempts, record.retries) == (2, 1)
        letter = dead.show(task_id)
        outline = replace(letter, traceback="", payload={})
        assert outline in dead.newest(10, lambda letter: letter.model == "dies").items
        assert (letter.code, letter.retries, letter.batch_id) == (
            "forward_failed",
            1,
            record.batch_id,
        )
        assert "Transient: not yet" in letter.error
        assert 'raise Transient("not yet")' in letter.traceback
        assert str(healed) in json.dumps(letter.payload)

        # It can be retried as any task that is over, because its letter holds what it was asked.
        retried = replay.retry(task_id).task_id
        wait_until(lambda: state(retried) is TaskState.FAILED)
        assert dead.show(retried).error == letter.error

        healed.touch()
        again = replay.replay(letter).task_id
        wait_until(lambda: state(again) is TaskState.SUCCEEDED)
    assert records.fetch(again)[0].replay_of == task_id
    assert state(task_id) is TaskState.FAILED
    with pytest.raises(TaskNotFound):
        dead.show(task_id)
    dead.discard(retried)
    with pytest.raises(TaskNotFound):
        dead.discard(retried)


def test_purge_cancels_exactly_those_that_wait(
    repository, start_worker, celery, records, control, submit, state
):
    repository.add("purge", batching={"max_batch_size": 1}, retries=LONG_PAUSE)
    repository.add("other")
    elsewhere = submit("other", "elsewhere")
    with start_worker("purge"):
        delayed = submit("purge", "once:p")
        wait_until(lambda: state(delayed) is TaskState.RETRYING)
        with occupied(celery, "purge", repository):
            buffered = [submit("purge", f"buffered {n}") for n in range(2)]
            wait_until(lambda: control.lanes.backlog("purge").held == 3)
            waiting = [submit("purge", f"waiting {n}") for n in range(3)]
            # Of a client that leaves no record.
            foreign = send(celery, "purge", "foreign")
            backlog = control.lanes.backlog("purge")
            assert (backlog.waiting, backlog.held, backlog.delayed) == (4, 3, 1)
            for count in (None, 4, 6):
                with pytest.raises(NotConfirmed, match="5 tasks of purge would be cancelled"):
                    control.purge("purge", count)
            assert control.purge("purge", 5) == 5
            backlog = control.lanes.backlog("purge")
            assert (backlog.waiting, backlog.held, backlog.delayed) == (0, 3, 0)
        wait_until(lambda: {state(task_id) for task_id in buffered} == {TaskState.SUCCEEDED})
        with pytest.raises(TaskCancelled, match="the lane of the task was purged"):
            foreign.get(timeout=10)
    for task_id in (delayed, *waiting, foreign.id):
        assert_cancelled(records, task_id)
    assert [text for text in repository.ran() if not text.startswith("hold:")] == [
        "once:p",
        "buffered 0",
        "buffered 1",
    ]
    assert state(elsewhere) is TaskState.QUEUED
    assert control.purge("other", 1) == 1


def test_paused_lane_is_handed_out_when_it_is_resumed(
    repository, start_worker, celery, control, submit, state
):
    repository.add("paused")
    with start_worker("paused"):
        send(celery, "paused", "before").get(timeout=10)
        control.lanes.pause("paused")
        assert control.lanes.paused("paused")
        task_id = submit("paused", "during")
        # The worker has had its chance: it is through with another round of its event loop.
        assert celery.control.ping(timeout=1)
        assert control.lanes.backlog("paused").waiting == 1
        assert state(task_id) is TaskState.QUEUED
        control.lanes.resume("paused")
        wait_until(lambda: state(task_id) is TaskState.SUCCEEDED)
    assert not control.lanes.paused("paused")
    assert repository.ran() == ["before", "during"]
