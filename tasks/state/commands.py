"""Commands of `Transitions.finish` for the end, retry and death of a task (step "settle").

`tasks.state.sharing` and `tasks.state.statistics` build further commands.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from inferno import names
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings

#: A Redis command with its arguments, or a table that `lua/finish.lua` describes.
Command = Sequence[Any] | Mapping[str, Any]


class Commands:
    """Builds the commands that change one task."""

    def __init__(self, settings: Settings) -> None:
        """Store the key prefix and lifetimes."""
        self._prefix = settings.redis.prefix
        self._tasks = settings.tasks

    def ended(
        self,
        record: Mapping[str, Any],
        task_id: str,
        state: TaskState,
        payload: bytes,
        keep_s: int = 0,
    ) -> list[Command]:
        """Return the commands that give a task its outcome and announce it.

        Args:
          record: fields to write if the task has no record.
          task_id: id of the task.
          state: a terminal state.
          payload: the outcome, from `tasks.state.outcomes.encode_outcome`.
          keep_s: how long to keep claimed inputs, in seconds; 0 deletes them.
        """
        return [
            {
                "kind": "end",
                "result": names.result_key(task_id),
                "outcome": payload,
                "state": state,
                "finished_at": repr(time.time()),
                **({"keep_inputs_s": keep_s} if keep_s else {}),
                **({"facts": in_turn(record)} if record else {}),
            }
        ]

    def retried(self, task_id: str, retries: int, due: float) -> list[Command]:
        """Return the commands that record that a task waits for its next attempt.

        Args:
          task_id: id of the task.
          retries: number of the next attempt; the first attempt has none.
          due: earliest start of the next attempt, in seconds since the epoch.
        """
        key = names.record_key(self._prefix, task_id)
        return [
            ["HSET", key, "state", TaskState.RETRYING, "retries", retries, "retry_at", due],
            ["EXPIRE", key, self._tasks.record_ttl_s],
            ["HINCRBY", names.counters_key(self._prefix), "retried", 1],
        ]

    def buried(self, task_id: str, fields: Mapping[str, Any]) -> list[Command]:
        """Return the commands that write a task's dead letter."""
        key, index = names.dead_key(self._prefix, task_id), names.dead_index_key(self._prefix)
        now = time.time()
        return [
            ["HSET", key, *(part for item in fields.items() for part in item)],
            ["EXPIRE", key, self._tasks.dead_ttl_s],
            ["ZADD", index, now, task_id],
            # The letters expire by themselves; their ids in the index do not.
            ["ZREMRANGEBYSCORE", index, "-inf", now - self._tasks.dead_ttl_s],
            ["HINCRBY", names.counters_key(self._prefix), "dead", 1],
        ]

    def kept(self, task_id: str, payload: bytes) -> list[Command]:
        """Return the commands that keep the arguments of a finished task."""
        key = names.payload_key(self._prefix, task_id)
        return [["SET", key, payload, "EX", self._tasks.result_ttl_s]]


def in_turn(fields: Mapping[str, Any]) -> list[str | bytes]:
    """Return names and values in turn, as HSET takes them."""
    return [_text(part) for item in fields.items() for part in item]


def packable(command: Command, payloads: list[bytes]) -> Command:
    """Return a command as `finish.lua` takes it, and append its payloads."""
    if not isinstance(command, Mapping):
        return [_text(part) for part in command]
    return {
        name: number_of(value, payloads) if isinstance(value, bytes) else value
        for name, value in command.items()
    }


def number_of(payload: bytes, payloads: list[bytes]) -> int:
    """Append a payload, and return the number by which the script gets it."""
    payloads.append(payload)
    return len(payloads)


def _text(value: str | bytes | float) -> str | bytes:
    """Return a value as Redis stores it. Lua would write a number with only 14 digits."""
    return value if isinstance(value, str | bytes) else repr(value)
