"""What is remembered of a task: its record, which outlives its result, and the result itself.

A record is a Redis hash. It is the guard of the task's one outcome: when it says that the task is
over, no later delivery runs it, and no later outcome replaces the first. Results are in Celery's
own format, so that `celery.result.AsyncResult` reads them.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
import redis

from inferno import names
from inferno.errors import ForwardFailed, InfernoError
from inferno.protocol.tasks import TERMINAL, TaskState
from inferno.settings import Settings
from tasks.connection import translated


@dataclass(frozen=True)
class Record:
    """What is known of one task."""

    task_id: str
    model: str
    #: Of the model, once known: a client may leave the choice to the worker.
    version: int | None
    state: TaskState
    #: Seconds since the epoch, as all times here.
    accepted_at: float
    started_at: float | None
    finished_at: float | None
    #: Forward passes started with the task in it.
    attempts: int
    priority: int
    batch_id: str | None


class Outcome(msgspec.Struct, frozen=True):
    """The one outcome of a finished task."""

    task_id: str
    #: JSON of `inferno.protocol.tasks.Result` when the task succeeded; empty otherwise.
    result: msgspec.Raw
    error: InfernoError | None

    @property
    def succeeded(self) -> bool:
        """Whether there is a result."""
        return self.error is None


class _Meta(msgspec.Struct):
    """Celery's format of a result."""

    task_id: str
    status: str
    result: msgspec.Raw


class _Failure(msgspec.Struct):
    """Celery's format of an exception."""

    exc_type: str
    exc_message: Any
    exc_module: str | None = None


_decode_meta = msgspec.json.Decoder(_Meta).decode
_decode_failure = msgspec.json.Decoder(_Failure).decode


def decode_outcome(payload: bytes) -> Outcome | None:
    """Read an outcome from Celery's format, as it is stored and published.

    Returns:
      The outcome, or None when the state is not a final one.
    """
    meta = _decode_meta(payload)
    if meta.status == "SUCCESS":
        return Outcome(meta.task_id, meta.result, None)
    if meta.status in ("FAILURE", "REVOKED"):
        return Outcome(meta.task_id, msgspec.Raw(b""), _rebuild(_decode_failure(meta.result)))
    return None


def encode_outcome(task_id: str, result: bytes | InfernoError) -> bytes:
    """Write an outcome in Celery's format.

    Args:
      task_id: whose it is.
      result: JSON of the result, or the error.
    """
    status = "SUCCESS"
    if isinstance(result, InfernoError):
        status = "FAILURE"
        result = msgspec.json.encode(
            _Failure(type(result).__name__, list(result.args), type(result).__module__)
        )
    return msgspec.json.encode(
        {
            "task_id": task_id,
            "status": status,
            "result": msgspec.Raw(result),
            "traceback": None,
            "children": [],
            "date_done": datetime.now(UTC).isoformat(),
        }
    )


def _rebuild(failure: _Failure) -> InfernoError:
    arguments = (
        failure.exc_message if isinstance(failure.exc_message, list) else [str(failure.exc_message)]
    )
    if failure.exc_module == InfernoError.__module__:
        kind = getattr(importlib.import_module(InfernoError.__module__), failure.exc_type)
        return cast(InfernoError, kind(*arguments))
    # Stored by Celery itself: a task that no worker knows, or one revoked by hand.
    return ForwardFailed(": ".join([failure.exc_type, *map(str, arguments)]))


class Records:
    """Reads and writes records and outcomes; its writes are atomic scripts."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Prepare the scripts.

        Args:
          client: answers in bytes.
          settings: prefix and lifetimes.
        """
        self._redis = client
        self._prefix = settings.redis.prefix
        self._record_ttl = settings.tasks.record_ttl_s
        self._result_ttl = settings.tasks.result_ttl_s
        self._begin = client.register_script(_BEGIN)
        self._settle = client.register_script(_SETTLE)

    def create(self, record: Record) -> None:
        """Write the record of an accepted task.

        Raises:
          BrokerUnavailable: Redis does not answer; nothing may be published then.
        """
        key = names.record_key(self._prefix, record.task_id)
        fields: dict[Any, Any] = {
            "state": record.state,
            "model": record.model,
            "accepted_at": record.accepted_at,
            "priority": record.priority,
        }
        if record.version is not None:
            fields["version"] = record.version
        with translated(), self._redis.pipeline() as pipe:
            pipe.hset(key, mapping=fields)
            pipe.expire(key, self._record_ttl)
            pipe.execute()

    def forget(self, task_id: str) -> None:
        """Delete the record of a task that was never published."""
        self._redis.delete(names.record_key(self._prefix, task_id))

    def fetch(self, task_id: str) -> tuple[Record | None, Outcome | None]:
        """Return a task's record and outcome, as far as they are there.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hgetall(names.record_key(self._prefix, task_id))
            pipe.get(names.result_key(task_id))
            fields, payload = pipe.execute()
        return (
            _record(task_id, fields) if fields else None,
            decode_outcome(payload) if payload else None,
        )

    def outcomes(self, task_ids: Sequence[str]) -> dict[str, Outcome]:
        """Return the outcomes of those tasks that are over, by id.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            payloads = self._redis.mget([names.result_key(task_id) for task_id in task_ids])
        decoded = {
            task_id: decode_outcome(payload)
            for task_id, payload in zip(task_ids, cast(list[bytes | None], payloads), strict=True)
            if payload is not None
        }
        return {task_id: outcome for task_id, outcome in decoded.items() if outcome is not None}

    def begin(self, tasks: Mapping[str, Mapping[str, Any]], batch_id: str) -> set[str]:
        """Mark tasks as running, just before their forward pass, and count the attempt.

        Args:
          tasks: by id, the fields to write where a task has no record: another client sent it.
          batch_id: of the batch they ride in.
        Returns:
          The ids of those that were not over already; the others must not run.
        """
        arguments: list[Any] = [
            TaskState.RUNNING,
            time.time(),
            batch_id,
            self._record_ttl,
            len(tasks),
            *tasks,
        ]
        for fields in tasks.values():
            arguments += [
                fields["model"],
                fields["version"],
                fields["accepted_at"],
                fields["priority"],
            ]
        keys = [names.record_key(self._prefix, task_id) for task_id in tasks]
        fresh = cast(list[int], self._begin(keys=keys, args=arguments))
        return {task_id for task_id, is_fresh in zip(tasks, fresh, strict=True) if is_fresh}

    def settle(self, outcomes: Mapping[str, tuple[TaskState, bytes]]) -> set[str]:
        """Store and announce outcomes, and close the records, in one step.

        Args:
          outcomes: by task id, the terminal state and what `encode_outcome` made.
        Returns:
          The ids for which this was the first outcome; for the others nothing was changed.
        """
        keys: list[str] = []
        arguments: list[Any] = [self._result_ttl, self._record_ttl, time.time()]
        for task_id, (state, payload) in outcomes.items():
            keys += [names.record_key(self._prefix, task_id), names.result_key(task_id)]
            arguments += [state, payload]
        first = cast(list[int], self._settle(keys=keys, args=arguments))
        return {task_id for task_id, is_first in zip(outcomes, first, strict=True) if is_first}

    def postpone(self, task_ids: Sequence[str]) -> None:
        """Mark tasks as waiting for their next attempt."""
        with self._redis.pipeline() as pipe:
            for task_id in task_ids:
                pipe.hset(names.record_key(self._prefix, task_id), "state", TaskState.RETRYING)
            pipe.execute()


def _record(task_id: str, fields: Mapping[bytes, bytes]) -> Record:
    text = {key.decode(): value.decode() for key, value in fields.items()}
    return Record(
        task_id=task_id,
        model=text["model"],
        version=int(text["version"]) if "version" in text else None,
        state=TaskState(text["state"]),
        accepted_at=float(text["accepted_at"]),
        started_at=float(text["started_at"]) if "started_at" in text else None,
        finished_at=float(text["finished_at"]) if "finished_at" in text else None,
        attempts=int(text.get("attempts", 0)),
        priority=int(text.get("priority", 0)),
        batch_id=text.get("batch_id"),
    )


_IS_OVER = "local over = {" + ", ".join(f"['{state}'] = true" for state in sorted(TERMINAL)) + "}\n"

_BEGIN = (
    _IS_OVER
    + """
local state, now, batch, ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local fresh = {}
for i, record in ipairs(KEYS) do
  local current = redis.call('HGET', record, 'state')
  if current and over[current] then
    fresh[i] = 0
  else
    local at = 5 + #KEYS + 4 * (i - 1)
    if not current then
      redis.call('HSET', record, 'accepted_at', ARGV[at + 3], 'priority', ARGV[at + 4])
    end
    redis.call('HSET', record, 'state', state, 'started_at', now, 'batch_id', batch,
               'model', ARGV[at + 1], 'version', ARGV[at + 2])
    redis.call('HINCRBY', record, 'attempts', 1)
    redis.call('EXPIRE', record, ttl)
    fresh[i] = 1
  end
end
return fresh
"""
)

_SETTLE = (
    _IS_OVER
    + """
local result_ttl, record_ttl, now = ARGV[1], ARGV[2], ARGV[3]
local first = {}
for i = 1, #KEYS / 2 do
  local record, result = KEYS[2 * i - 1], KEYS[2 * i]
  local state, payload = ARGV[2 * i + 2], ARGV[2 * i + 3]
  local current = redis.call('HGET', record, 'state')
  if current and over[current] then
    first[i] = 0
  else
    redis.call('SET', result, payload, 'EX', result_ttl)
    if current then
      redis.call('HSET', record, 'state', state, 'finished_at', now)
      redis.call('EXPIRE', record, record_ttl)
    end
    redis.call('PUBLISH', result, payload)
    first[i] = 1
  end
end
return first
"""
)
