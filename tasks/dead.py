"""Dead letters: tasks that were given up after every attempt, with what explains it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import redis
from celery import Celery
from kombu.utils.json import loads

from inferno import names
from inferno.errors import TaskNotFound
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from tasks.connection import translated
from tasks.records import Record
from tasks.submit import Accepted, Submitter


@dataclass(frozen=True)
class DeadLetter:
    """A task that was given up. Times are in seconds since the epoch."""

    task_id: str
    model: str
    version: int | None
    priority: int
    accepted_at: float
    died_at: float
    #: The error's stable name, and what it says.
    code: str
    error: str
    #: Where it was raised, when it was raised by the model.
    traceback: str
    #: The batch that the task rode in last.
    batch_id: str
    retries: int
    #: What the task was asked: the keyword arguments of its message.
    payload: dict[str, Any]

    @classmethod
    def read(cls, task_id: str, fields: Mapping[bytes, bytes]) -> DeadLetter:
        """Return a dead letter from its hash."""
        text = {key.decode(): value.decode() for key, value in fields.items()}
        return cls(
            task_id=task_id,
            model=text["model"],
            version=int(text["version"]) if "version" in text else None,
            priority=int(text["priority"]),
            accepted_at=float(text["accepted_at"]),
            died_at=float(text["died_at"]),
            code=text["code"],
            error=text["error"],
            traceback=text["traceback"],
            batch_id=text["batch_id"],
            retries=int(text["retries"]),
            payload=loads(text["payload"]),
        )


class DeadLetters:
    """Lists, shows, replays and discards dead letters."""

    def __init__(self, app: Celery, client: redis.Redis, settings: Settings) -> None:
        """Store where they are.

        Args:
          app: its broker takes replays.
          client: of the Redis that holds the records.
          settings: prefix and lifetime.
        """
        self._redis = client
        self._prefix = settings.redis.prefix
        self._ttl_s = settings.tasks.dead_ttl_s
        self._submitter = Submitter(app, client, settings)

    def count(self) -> int:
        """Return how many there are.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        index = names.dead_index_key(self._prefix)
        with translated(), self._redis.pipeline() as pipe:
            # The letters themselves expire by their own time to live.
            pipe.zremrangebyscore(index, "-inf", time.time() - self._ttl_s)
            pipe.zcard(index)
            return int(pipe.execute()[1])

    def newest(self, offset: int = 0, count: int = 100) -> list[DeadLetter]:
        """Return some, newest first.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        index = names.dead_index_key(self._prefix)
        with translated():
            ids = cast(
                list[bytes], self._redis.zrange(index, offset, offset + count - 1, desc=True)
            )
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            for task_id in ids:
                pipe.hgetall(names.dead_key(self._prefix, task_id.decode()))
            found = zip(ids, pipe.execute(), strict=True)
        return [DeadLetter.read(task_id.decode(), fields) for task_id, fields in found if fields]

    def show(self, task_id: str) -> DeadLetter:
        """Return the dead letter of a task.

        Raises:
          TaskNotFound: there is none.
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            fields = self._redis.hgetall(names.dead_key(self._prefix, task_id))
        if not fields:
            raise TaskNotFound(f"no dead letter has the id {task_id!r}")
        return DeadLetter.read(task_id, cast(dict[bytes, bytes], fields))

    def replay(self, task_id: str) -> Accepted:
        """Run a dead task again, as a new task, and discard its letter.

        Raises:
          TaskNotFound: there is no such letter.
          BrokerUnavailable: Redis does not answer.
        """
        letter = self.show(task_id)
        record = Record(
            task_id, letter.model, letter.version, TaskState.FAILED, letter.accepted_at,
            priority=letter.priority,
        )  # fmt: skip
        accepted = self._submitter.repeat(record, letter.payload)
        self.discard(task_id)
        return accepted

    def discard(self, task_id: str) -> bool:
        """Delete a dead letter; returns whether there was one.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline() as pipe:
            pipe.delete(names.dead_key(self._prefix, task_id))
            pipe.zrem(names.dead_index_key(self._prefix), task_id)
            return bool(pipe.execute()[0])
