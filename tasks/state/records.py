"""The record of a task: its state and times. It outlives the task's result.

A record is a Redis hash. The scripts of `tasks.state.transitions` write it (steps "submit",
"forward" and "settle"); this module reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
import redis

from inferno import names
from inferno.errors import StateUnreadable
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.broker.lanes import Held
from tasks.state.listing import Page, Place, read_page
from tasks.state.outcomes import Outcome, decode_outcome
from tasks.transport.script import Script

#: First second of the year 10000, which no date can hold.
_LATEST = 253_402_300_800

logger = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """The record of one task. Times are in seconds since the epoch."""

    task_id: str
    model: str
    #: Version of the model; None until a worker has chosen it, if the client did not.
    version: int | None
    state: TaskState
    accepted_at: float
    priority: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    #: Forward passes that have started with the task in them.
    attempts: int = 0
    #: Attempts after a transient error.
    retries: int = 0
    #: Earliest start of the next attempt.
    retry_at: float | None = None
    #: Latest start of the forward pass.
    deadline: float | None = None
    batch_id: str | None = None
    #: Id of the task that this one repeats.
    replay_of: str | None = None
    #: Id of the ensemble's task, if this one is a stage.
    parent: str | None = None
    #: URL of its webhook.
    webhook: str | None = None
    #: Events that the webhook is called for.
    webhook_events: tuple[str, ...] = ()
    #: Channel of the process in which its client waits; the outcome is announced there.
    reply_to: str | None = None
    #: Shared key of tasks with equal inputs; see `tasks.state.sharing`.
    shared: str | None = None
    #: Whether a kept result answered the task.
    cached: bool = False
    #: Stream entry of its message when it was accepted: in its lane, or among the followers of
    #: another task.
    location: Held = msgspec.field(default_factory=Held)

    @classmethod
    def read(cls, task_id: str, fields: Mapping[bytes, bytes]) -> Record:
        """Return the record from its hash.

        Raises:
          StateUnreadable: the platform has not written it.
        """
        try:
            return cls._read(task_id, fields)
        except (LookupError, ValueError) as exc:
            why = f"the record of task {task_id} cannot be read: {exc!r}"
            raise StateUnreadable(why) from None

    @classmethod
    def _read(cls, task_id: str, fields: Mapping[bytes, bytes]) -> Record:
        text = {key.decode(): value.decode() for key, value in fields.items()}

        def number(name: str) -> float | None:
            value = float(text[name]) if name in text else None
            if value is not None and not 0 <= value < _LATEST:
                raise ValueError(f"{name}: {value} is not a time")
            return value

        accepted_at = number("accepted_at")
        if accepted_at is None:
            raise KeyError("accepted_at")
        return cls(
            task_id=task_id,
            model=text["model"],
            version=int(text["version"]) if "version" in text else None,
            state=TaskState(text["state"]),
            accepted_at=accepted_at,
            priority=int(text.get("priority", 0)),
            started_at=number("started_at"),
            finished_at=number("finished_at"),
            attempts=int(text.get("attempts", 0)),
            retries=int(text.get("retries", 0)),
            retry_at=number("retry_at"),
            deadline=number("deadline"),
            batch_id=text.get("batch_id"),
            replay_of=text.get("replay_of"),
            parent=text.get("parent"),
            webhook=text.get("webhook"),
            webhook_events=tuple(text.get("webhook_events", "").split()),
            reply_to=text.get("reply_to"),
            shared=text.get("shared"),
            cached="cached" in text,
            location=Held(text.get("stream", ""), text.get("entry", "")),
        )

    def fields(self) -> dict[str, str | int | float]:
        """Return the fields of the hash of a new task."""
        given = {
            "state": self.state,
            "model": self.model,
            "version": self.version,
            "accepted_at": self.accepted_at,
            "priority": self.priority,
            "deadline": self.deadline,
            "replay_of": self.replay_of,
            "parent": self.parent,
            "webhook": self.webhook,
            "webhook_events": " ".join(self.webhook_events) or None,
            "reply_to": self.reply_to,
            "shared": self.shared,
        }
        return {name: value for name, value in given.items() if value is not None}

    def overdue(self, now: float) -> bool:
        """Return whether the deadline is over and no forward pass has started."""
        waiting = self.state in (TaskState.QUEUED, TaskState.RETRYING)
        return waiting and self.deadline is not None and self.deadline < now


class Records:
    """Reads records and outcomes."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where records are.

        Args:
          client: answers in bytes.
          settings: key prefix.
        """
        self._redis = client
        self._prefix = settings.redis.prefix
        self._fetch = Script("tasks.state", "fetch")

    def fetch(self, task_id: str) -> tuple[Record | None, Outcome | None]:
        """Return a task's record and outcome as of one moment; None for what does not exist.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        keys = {
            "record": names.record_key(self._prefix, task_id),
            "result": names.result_key(task_id),
        }
        with translated():
            flat, payload = self._fetch.run(self._redis, keys)
        return (
            Record.read(task_id, dict(zip(flat[::2], flat[1::2], strict=True))) if flat else None,
            decode_outcome(payload) if payload else None,
        )

    def outcomes(self, task_ids: Sequence[str]) -> dict[str, Outcome]:
        """Return the outcomes of the tasks that are over, by task id.

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

    def newest(
        self, most: int, wanted: Callable[[Record], bool], after: Place | None = None
    ) -> Page[Record]:
        """Return the records of the newest tasks, newest first, without those that have expired.

        Args:
          most: most records of the page; see `tasks.state.listing.read_page`.
          wanted: whether a record belongs on the page.
          after: last place of the page before.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        index = names.index_key(self._prefix)
        return read_page(self._redis, index, self.records, wanted, most, after)

    def records(self, task_ids: Sequence[str]) -> list[Record | None]:
        """Return the records of tasks; None for a task without a record.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.hgetall(names.record_key(self._prefix, task_id))
            found = list(zip(task_ids, pipe.execute(raise_on_error=False), strict=True))
        return [_readable(task_id, fields) for task_id, fields in found]

    def result_bytes(self, task_ids: Sequence[str]) -> list[int]:
        """Return the sizes of stored results, in bytes; 0 for a task without one.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.strlen(names.result_key(task_id))
            return cast(list[int], pipe.execute())


def _readable(task_id: str, fields: Any) -> Record | None:
    """Return a record; None if there is none, or none that can be read."""
    if isinstance(fields, redis.ResponseError):
        logger.error("the record of task %s cannot be read: %s", task_id, fields)
        return None
    if isinstance(fields, Exception):
        raise fields
    try:
        return Record.read(task_id, fields) if fields else None
    except StateUnreadable as exc:
        logger.error("%s", exc)
        return None
