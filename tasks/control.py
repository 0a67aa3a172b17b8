"""What clients and operators may do to tasks that are under way, and to whole lanes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

import orjson
import redis
from celery import Celery
from kombu.utils.json import loads

from inferno import names
from inferno.errors import (
    DeadlineExceeded,
    InfernoError,
    PayloadGone,
    TaskCancelled,
    TaskNotFound,
    WrongState,
)
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from tasks import webhooks
from tasks.connection import translated
from tasks.lanes import Lanes, Message
from tasks.records import Record, Records, encode_outcome
from tasks.submit import Accepted, Submitter
from tasks.transitions import Command, Step, Transitions, Verdict


class Control:
    """Cancels, expires and repeats tasks, and empties lanes."""

    #: Tasks that one round trip cancels.
    CHUNK = 100

    def __init__(self, app: Celery, client: redis.Redis, settings: Settings) -> None:
        """Store where tasks and lanes are.

        Args:
          app: its broker carries the lanes.
          client: of the Redis that holds the records.
          settings: lifetimes, and which payloads are kept.
        """
        self._redis = client
        self._settings = settings
        self._records = Records(client, settings)
        self._transitions = Transitions(client, settings)
        self._submitter = Submitter(app, client, settings)
        self.lanes = Lanes(app, client, settings)

    def cancel(self, task_id: str) -> None:
        """Take a task back, wherever it is; if it runs, its result is discarded.

        To cancel a cancelled task does nothing.

        Raises:
          TaskNotFound: there is no such task.
          WrongState: it has its outcome.
          BrokerUnavailable: Redis does not answer.
        """
        record = self._known(task_id)
        error = TaskCancelled("it was cancelled")
        if record.state is TaskState.CANCELLED or self._end([record], error):
            return
        state = self._known(task_id).state
        if state is not TaskState.CANCELLED:
            raise WrongState(f"the task is {state}; it can be cancelled only before it is over")

    def expire(self, record: Record) -> bool:
        """End a task whose deadline has passed while nobody had it in hands.

        Returns:
          whether it was still waiting.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        late = DeadlineExceeded("no worker took it within timeout_ms", "timeout_ms")
        return bool(self._end([record], late))

    def retry(self, task_id: str) -> Accepted:
        """Run again, as a new task, what a finished one was asked.

        Raises:
          TaskNotFound: there is no such task.
          WrongState: it is not over.
          PayloadGone: what it was asked was not kept; see `INFERNO_TASKS__KEEP_PAYLOADS`.
          BrokerUnavailable: Redis does not answer.
        """
        record = self._known(task_id)
        if not record.state.terminal:
            raise WrongState(f"the task is {record.state}; it can be retried when it is over")
        prefix = self._settings.redis.prefix
        with translated():
            payload = self._redis.get(names.payload_key(prefix, task_id)) or self._redis.hget(
                names.dead_key(prefix, task_id), "payload"
            )
        if payload is None:
            raise PayloadGone(
                "what the task was asked was deleted when it ended; "
                "INFERNO_TASKS__KEEP_PAYLOADS=failed keeps it for such tasks"
            )
        return self._submitter.repeat(record, loads(cast(bytes, payload)))

    def purge(self, model: str) -> int:
        """Cancel every task that waits in a model's lane; those in workers' hands go on.

        Returns:
          how many were cancelled.
        Raises:
          NotSupported: the lane is no stream.
          BrokerUnavailable: Redis does not answer.
        """
        error = TaskCancelled("its lane was purged")
        # All ids first: cancelling changes what there is to read.
        waiting = list(self.lanes.waiting(model))
        return sum(self._end(records, error) for records in self._read(waiting))

    def _read(self, task_ids: Iterable[str]) -> Iterator[list[Record]]:
        ids = list(task_ids)
        for start in range(0, len(ids), self.CHUNK):
            found = self._records.records(ids[start : start + self.CHUNK])
            yield [record for record in found if record is not None]

    def _known(self, task_id: str) -> Record:
        (record,) = self._records.records([task_id])
        if record is None:
            raise TaskNotFound(f"no task has the id {task_id!r}")
        return record

    def _end(self, records: list[Record], error: InfernoError) -> int:
        """Give tasks that are not over this outcome; returns how many there were."""
        state = TaskState.EXPIRED if isinstance(error, DeadlineExceeded) else TaskState.CANCELLED
        messages = [self._webhook(record) for record in records]
        steps = [
            Step(record.task_id, record.held, self._commands(record, state, error, message))
            for record, message in zip(records, messages, strict=True)
        ]
        with translated():
            verdicts = self._transitions.finish(steps, fenced=False)
        ended = [verdict is Verdict.DONE for verdict in verdicts]
        if not self.lanes.streams:
            for message, done in zip(messages, ended, strict=True):
                if message is not None and done:
                    self.lanes.send(message)
        return sum(ended)

    def _commands(
        self, record: Record, state: TaskState, error: InfernoError, webhook: Message | None
    ) -> list[Command]:
        payload = encode_outcome(record.task_id, error)
        commands = self._transitions.ended({}, record.task_id, state, payload)
        if self._settings.tasks.keep_payloads != "never" and (asked := self._asked(record)):
            commands += self._transitions.kept(record.task_id, asked)
        if webhook is not None and self.lanes.streams:
            commands.append(self.lanes.enqueue(webhook))
        return commands

    def _asked(self, record: Record) -> bytes | None:
        """Return what a waiting task is asked, from its message, where that can be found."""
        if not record.held.entry:
            return None
        with translated():
            found: Any = self._redis.xrange(
                record.held.stream, record.held.entry, record.held.entry
            )
        if not found:
            return None
        _, kwargs, _ = loads(loads(found[0][1][b"message"])["body"])
        return orjson.dumps(kwargs)

    def _webhook(self, record: Record) -> Message | None:
        if record.webhook is None or "completed" not in record.webhook_events:
            return None
        return webhooks.message(
            record.webhook,
            record.task_id,
            "completed",
            record.model,
            record.version,
            time.time(),
        )
