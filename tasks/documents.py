"""What is known of a task, as the JSON document that clients receive."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from inferno.errors import DeadlineExceeded, ResultExpired, TaskCancelled, TaskNotFound
from inferno.protocol.tasks import TaskState
from tasks.dead import DeadLetter
from tasks.records import Outcome, Record


class _Parts(msgspec.Struct):
    """A stored result; its parts are passed on as they are, without being decoded."""

    model: str
    version: int
    outputs: msgspec.Raw
    timings: msgspec.Raw
    batch: msgspec.Raw
    worker: msgspec.Raw
    cached: bool = False
    #: Of an ensemble; empty for others.
    stages: msgspec.Raw = msgspec.Raw()


_decode_parts = msgspec.json.Decoder(_Parts).decode


def links(task_id: str) -> dict[str, str]:
    """Return where a task can be asked for."""
    return {"self": f"/tasks/{task_id}", "websocket": f"/ws/{task_id}"}


def _answer(outcome: Outcome) -> dict[str, Any]:
    parts = _decode_parts(outcome.result)
    return {
        "outputs": parts.outputs,
        "task_id": outcome.task_id,
        "model": parts.model,
        "version": parts.version,
        "timings": parts.timings,
        "batch": parts.batch,
        "worker": parts.worker,
        **({"cached": True} if parts.cached else {}),
        **({"stages": parts.stages} if bytes(parts.stages) else {}),
    }


def task(task_id: str, record: Record | None, outcome: Outcome | None) -> dict[str, Any]:
    """Return everything that is known of a task.

    Raises:
      TaskNotFound: nothing is.
      ResultExpired: it is over, and its result was deleted.
    """
    if record is None and outcome is None:
        raise TaskNotFound(f"no task has the id {task_id!r}")
    document: dict[str, Any] = {"task_id": task_id}
    if record is not None:
        document |= summary(record)
    if outcome is None:
        assert record is not None
        if record.state.terminal:
            raise ResultExpired(
                f"task {task_id} is over ({record.state}), and its result was deleted"
            )
    elif outcome.error is None:
        document |= _answer(outcome) | {"status": TaskState.SUCCEEDED}
    else:
        document |= {"status": _failed_state(record, outcome), "error": outcome.error.problem()}
    document["links"] = links(task_id)
    return document


def summary(record: Record) -> dict[str, Any]:
    """Return what a list says of a task."""
    retry_at = record.retry_at if record.state is TaskState.RETRYING else None
    some = {
        "retry_at": time(retry_at),
        "batch_id": record.batch_id,
        "replay_of": record.replay_of,
        "parent": record.parent,
    }
    return {
        "task_id": record.task_id,
        "model": record.model,
        "version": record.version,
        "status": record.state,
        "attempts": record.attempts,
        "retries": record.retries,
        "priority": record.priority,
        "accepted_at": time(record.accepted_at),
        "started_at": time(record.started_at),
        "finished_at": time(record.finished_at),
        **{name: value for name, value in some.items() if value is not None},
        **({"cached": True} if record.cached else {}),
        "links": links(record.task_id),
    }


def dead_letter(letter: DeadLetter) -> dict[str, Any]:
    """Return what a list says of a dead letter."""
    return {
        "task_id": letter.task_id,
        "model": letter.model,
        "version": letter.version,
        "priority": letter.priority,
        "retries": letter.retries,
        "accepted_at": time(letter.accepted_at),
        "died_at": time(letter.died_at),
        "batch_id": letter.batch_id,
        "error": {"code": letter.code, "detail": letter.error},
        "links": {"self": f"/dead/{letter.task_id}", "task": f"/tasks/{letter.task_id}"},
    }


def _failed_state(record: Record | None, outcome: Outcome) -> TaskState:
    if record is not None and record.state.terminal:
        return record.state
    if isinstance(outcome.error, TaskCancelled):
        return TaskState.CANCELLED
    return TaskState.EXPIRED if isinstance(outcome.error, DeadlineExceeded) else TaskState.FAILED


def time(seconds: float | None) -> str | None:
    """Return seconds since the epoch as ISO 8601 in UTC, to the millisecond."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
