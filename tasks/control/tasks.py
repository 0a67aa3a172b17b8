"""Cancels tasks, expires them and purges lanes; runs in web processes and ensemble workers."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass

import orjson
import redis
from celery import Celery
from kombu.utils.json import loads

from inferno.errors import (
    DeadlineExceeded,
    InfernoError,
    NotConfirmed,
    TaskCancelled,
    TaskNotFound,
    WrongState,
)
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from tasks.broker import webhook_message as notice
from tasks.broker.connection import translated
from tasks.broker.lanes import Lanes, TaskMessage, WaitingMessage
from tasks.state.commands import Command
from tasks.state.outcomes import encode_outcome
from tasks.state.records import Record, Records
from tasks.state.sharing import Sharer
from tasks.state.statistics import Tally
from tasks.state.transitions import Step, Transitions, Verdict


@dataclass(frozen=True)
class _Target:
    """A task to end, and its message."""

    record: Record
    waiting: WaitingMessage


class Control:
    """Ends tasks before a worker does."""

    #: Number of tasks that are cancelled in one round trip.
    CHUNK = 100

    def __init__(self, app: Celery, client: redis.Redis, settings: Settings) -> None:
        """Store where tasks and lanes are.

        Args:
          app: Celery app whose broker carries the lanes.
          client: Redis that holds the records.
          settings: lifetimes, and which payloads are kept.
        """
        self._settings = settings
        self._records = Records(client, settings)
        self._transitions = Transitions(client, settings)
        self._sharer = Sharer(settings)
        self._tally = Tally(settings)
        self.lanes = Lanes(app, client, settings)

    def cancel(self, task_id: str) -> None:
        """Cancel a task, wherever it is; the result of a running task is discarded.

        Cancelling twice is harmless.

        Raises:
          TaskNotFound: no task has this id.
          WrongState: the task is over.
          BrokerUnavailable: Redis does not answer.
        """
        (refused,) = self.cancel_all([task_id])
        if refused is not None:
            raise refused

    def cancel_all(self, task_ids: Sequence[str]) -> list[TaskNotFound | WrongState | None]:
        """Cancel tasks in a few round trips; see `cancel`.

        Args:
          task_ids: at most `CHUNK` different ids.
        Returns:
          for each why it was not cancelled, or None.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        known = dict(zip(task_ids, self._records.records(task_ids), strict=True))
        running = [
            record
            for record in known.values()
            if record is not None and record.state is not TaskState.CANCELLED
        ]
        error = TaskCancelled("the task was cancelled")
        ended = self._end([self._target(record) for record in running], error)
        # The others ended by themselves, or another caller cancelled them meanwhile.
        over = [record.task_id for record, done in zip(running, ended, strict=True) if not done]
        known.update(zip(over, self._records.records(over), strict=True))
        left = {*over, *(task_id for task_id, record in known.items() if record is None)}
        return [_refusal(task_id, known[task_id]) if task_id in left else None for task_id in known]

    def expire(self, record: Record) -> bool:
        """End a task whose deadline has passed before a worker fetched it.

        Returns:
          whether the task was still waiting.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        late = DeadlineExceeded("no worker took the task within timeout_ms", "timeout_ms")
        return all(self._end([self._target(record)], late))

    def purge(self, model: str, count: int | None) -> int:
        """Cancel every task that waits in a model's lane or for its next attempt.

        Tasks that a worker has fetched are not affected.

        Args:
          model: the model whose lane is purged.
          count: number of tasks that the caller expects to cancel.
        Returns:
          number of cancelled tasks.
        Raises:
          NotConfirmed: the number of waiting tasks is not `count`.
          NotSupported: the lane is not a Redis stream.
          BrokerUnavailable: Redis does not answer.
        """
        error = TaskCancelled("the lane of the task was purged")
        backlog = self.lanes.backlog(model)
        found = backlog.waiting + backlog.delayed
        # Read them all before the first is cancelled: cancelling changes the lane.
        waiting = list(self.lanes.waiting(model)) if found == count else []
        if len(waiting) != count:
            raise NotConfirmed(
                f"{len(waiting) or found} tasks of {model} would be cancelled", "confirm"
            )
        ended = 0
        for start in range(0, len(waiting), self.CHUNK):
            part = waiting[start : start + self.CHUNK]
            known = self._records.records([one.task_id for one in part])
            targets = [
                _Target(record or self._unrecorded(one, model), one)
                for record, one in zip(known, part, strict=True)
            ]
            ended += sum(self._end(targets, error))
        return ended

    def _unrecorded(self, waiting: WaitingMessage, model: str) -> Record:
        """Return a record for a task without one: another Celery client's, or an expired one."""
        payload = _payload(waiting.message or self.lanes.at(waiting.entry))
        arguments = orjson.loads(payload) if payload else {}
        arguments = arguments if isinstance(arguments, dict) else {}
        key, version = arguments.get("cache"), arguments.get("version")
        return Record(
            waiting.task_id,
            model,
            version if type(version) is int else None,
            TaskState.QUEUED,
            time.time(),
            shared=key if isinstance(key, str) else None,
        )

    def _target(self, record: Record) -> _Target:
        """Find the message of a task to end."""
        if record.state is TaskState.RETRYING and record.retry_at is not None:
            for waiting in self.lanes.postponed(record.model, record.retry_at):
                if waiting.task_id == record.task_id:
                    return _Target(record, waiting)
        return _Target(record, WaitingMessage(record.task_id, record.location))

    def _end(self, targets: list[_Target], error: InfernoError) -> list[bool]:
        """End those of the tasks that are not over with an error; return for each if it was."""
        state = TaskState.EXPIRED if isinstance(error, DeadlineExceeded) else TaskState.CANCELLED
        calls = [self._webhook(target.record) for target in targets]
        steps = [
            Step(
                target.record.task_id,
                target.waiting.entry,
                self._commands(target, state, error, call),
            )
            for target, call in zip(targets, calls, strict=True)
        ]
        with translated():
            verdicts = self._transitions.finish(steps, fenced=False)
        ended = [verdict is Verdict.DONE for verdict in verdicts]
        if not self.lanes.streams:
            for call, done in zip(calls, ended, strict=True):
                if call is not None and done:
                    self.lanes.send(call)
        return ended

    def _commands(
        self, target: _Target, state: TaskState, error: InfernoError, call: TaskMessage | None
    ) -> list[Command]:
        record, waiting = target.record, target.waiting
        payload = encode_outcome(record.task_id, error)
        facts = {"model": record.model, "accepted_at": record.accepted_at}
        tasks, kept = self._settings.tasks, None
        if tasks.keep_payloads != "never":
            kept = _payload(waiting.message or self.lanes.at(waiting.entry))
        keep_s = tasks.result_ttl_s if kept else 0
        commands = self._transitions.commands.ended(facts, record.task_id, state, payload, keep_s)
        commands += self._transitions.commands.kept(record.task_id, kept) if kept else []
        if record.version is not None:
            commands.append(self._tally.failed(record.model, record.version, record.accepted_at))
        if record.shared is not None:
            commands += self._sharer.disbanded(record.shared)
        if waiting.removal:
            commands.append(waiting.removal)
        if call is not None and self.lanes.streams:
            commands.append(self.lanes.enqueue(call))
        return commands

    def _webhook(self, record: Record) -> TaskMessage | None:
        if record.webhook is None or "completed" not in record.webhook_events:
            return None
        return notice.message(
            record.webhook,
            record.task_id,
            "completed",
            record.model,
            record.version,
            time.time(),
        )


def _refusal(task_id: str, record: Record | None) -> TaskNotFound | WrongState | None:
    """Return why a task that was not cancelled now cannot be; None if it was cancelled before."""
    if record is None:
        return TaskNotFound(f"no task has the id {task_id!r}")
    if record.state is TaskState.CANCELLED:
        return None
    return WrongState(f"the task is {record.state}; only a task that is not over can be cancelled")


def _payload(text: bytes) -> bytes | None:
    """Return the keyword arguments of a message as JSON, or None if they cannot be read."""
    try:
        envelope = loads(text)
        body = envelope["body"]
        if envelope["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        return orjson.dumps(loads(body)[1])
    except (ValueError, LookupError, TypeError):
        return None
