"""The changes of a task's state: each is one Lua script, which Redis runs as one atomic step.

    submit    accept   record, idempotency key and message appear together, or not at all
    forward   begin    QUEUED or RETRYING -> RUNNING, just before a forward pass; counts the attempt
    settle    finish   everything else that happens to a task; acknowledges its message

A task whose inputs equal those of an earlier task may be over when it is accepted, or wait for that
task's result; see `tasks.state.sharing`.

Two guards make sure that a task has one outcome. The record: a task that is over stays as it is.
The fence: a worker that was thought dead and has lost its messages to another worker changes
nothing. (Other brokers than Redis Streams have only the first guard, and acknowledge messages after
the step.)

The states, and which may follow which, are `inferno.protocol.tasks.TRANSITIONS`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, cast

import msgspec
import redis

from inferno import names
from inferno.errors import KeyReused, Overloaded, PayloadGone
from inferno.settings import Settings
from tasks.broker.lanes import Held
from tasks.state.claims import Claim
from tasks.state.commands import Command, Commands, in_turn, number_of, packable
from tasks.state.deployments import GENERATION, Outdated
from tasks.state.kept_results import Cache
from tasks.state.outcomes import Outcome, decode_outcome
from tasks.state.records import Record
from tasks.state.sharing import MOST_FOLLOWERS, Sharing
from tasks.transport import consumer_name
from tasks.transport.refusals import is_refusal
from tasks.transport.script import Script


@dataclass(frozen=True)
class Idempotency:
    """The Idempotency-Key of a request."""

    #: Digest of the key and of everything that limits its scope.
    digest: str
    #: Digest of the request's body: a key must not be used again with another body.
    fingerprint: str


class Arrival(msgspec.Struct, frozen=True):
    """A task to accept."""

    record: Record
    #: Key of its lane, from `Lanes.key`; "" when the caller publishes the message.
    lane: str
    #: Its message, from `Lanes.pack`.
    payload: bytes
    #: The task is made once, however often a request repeats this key.
    idempotency: Idempotency | None = None
    #: Refuse the task if more tasks than this are ahead of it: those in its lane or held by
    #: workers, with at least its priority.
    most_waiting: int | None = None
    #: How another task's result may answer this one, if at all.
    sharing: Sharing | None = None
    #: Its inputs, if they are not in its message.
    claim: Claim | None = None
    #: Deployment generation under which the version was chosen; refuse the task if it has changed.
    generation: int | None = None


class Admitted(msgspec.Struct, frozen=True):
    """A task that was accepted."""

    #: Id of the earlier task, if its idempotency key had already made one.
    task_id: str
    #: Outcome of a task that was over at once.
    outcome: Outcome | None = None


#: Why a task was not accepted.
Refusal = Overloaded | KeyReused | PayloadGone | Outdated


class Verdict(Enum):
    """What became of a transition."""

    #: It happened.
    DONE = "done"
    #: The task was over already; its message is gone, and nothing else has changed.
    OVER = "over"
    #: Another worker holds the message; nothing has changed.
    STALE = "stale"
    #: The task may have ended its worker before, so it must run alone; nothing has changed.
    SUSPECT = "suspect"


class Begun(msgspec.Struct, frozen=True):
    """The answer to `Transitions.begin` for one task."""

    verdict: Verdict
    #: Forward passes that have started with the task in them, this one included.
    attempts: int
    #: Attempts during which the worker ended.
    lost: int
    #: Batch of the last attempt.
    batch_id: str


class Rider(msgspec.Struct, frozen=True):
    """A task of a batch that is about to run."""

    task_id: str
    held: Held
    #: Written, like the fields below, if another Celery client sent the task without a record.
    model: str
    version: int
    accepted_at: float
    priority: int


class Step(msgspec.Struct, frozen=True):
    """The commands that settle one task and its message, together or not at all."""

    task_id: str
    held: Held
    commands: list[Command] = msgspec.field(default_factory=list)


class Transitions:
    """Changes the states of tasks, each time in one round trip to Redis."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Load the scripts.

        Args:
          client: answers in bytes, and does not retry.
          settings: key prefix and lifetimes.
        """
        self._redis = client
        self._prefix = settings.redis.prefix
        self._tasks = settings.tasks
        # As text: Lua is slow to write numbers, and these only pass through.
        self._lifetimes = {
            "record_ttl_s": str(self._tasks.record_ttl_s),
            "result_ttl_s": str(self._tasks.result_ttl_s),
            "claim_ttl_s": str(self._tasks.claim_ttl_s),
            "idempotency_ttl_s": str(self._tasks.idempotency_ttl_s),
        }
        self._accept = Script("tasks.state", "accept")
        self._begin = Script("tasks.state", "begin")
        self._finish = Script("tasks.state", "finish")
        self._kept_results = Cache(client, settings)
        #: Builds commands for `finish`.
        self.commands = Commands(settings)

    def accept(self, arrivals: Sequence[Arrival]) -> list[Admitted | Refusal]:
        """Write the records of new tasks and publish their messages, all in one step.

        Repeating the call with the same records is harmless, for example when the connection was
        lost before the answer.

        Args:
          arrivals: the tasks; their ids must differ.
        Returns:
          for each task what was accepted, or why it was refused.
        Raises:
          redis.RedisError: Redis refused the step, or was lost before it answered.
        """
        payloads: list[bytes] = []
        arguments = {
            "index": names.index_key(self._prefix),
            "deployments": names.deployments_key(self._prefix),
            "packages": names.packages_key(self._prefix),
            "cache": names.cache_keys(self._prefix),
            "generation_field": GENERATION,
            **self._lifetimes,
            "listed": self._tasks.listed,
            "max_followers": MOST_FOLLOWERS,
            "date": datetime.now(UTC).isoformat(),
            "tasks": [self._arriving(arrival, payloads) for arrival in arrivals],
        }
        replies = cast(list[tuple[bytes, bytes]], self._run(self._accept, arguments, payloads))
        return [
            _accepted(arrival, answer, value)
            for arrival, (answer, value) in zip(arrivals, replies, strict=True)
        ]

    def _arriving(self, arrival: Arrival, payloads: list[bytes]) -> dict[str, Any]:
        """Return a task as `accept.lua` takes it, and append its payloads."""
        record, idempotency, claim = arrival.record, arrival.idempotency, arrival.claim
        task: dict[str, Any] = {
            "id": record.task_id,
            "record": names.record_key(self._prefix, record.task_id),
            "accepted_at": repr(record.accepted_at),
            "facts": in_turn(record.fields()),
            "priority": str(record.priority),
        }
        if arrival.lane:
            task |= {"lane": arrival.lane, "message": number_of(arrival.payload, payloads)}
        if arrival.most_waiting is not None:
            task["most_ahead"] = arrival.most_waiting
        if arrival.generation is not None:
            task["generation"] = str(arrival.generation)
        if idempotency is not None:
            task["idempotency"] = {
                "key": names.idempotency_key(self._prefix, idempotency.digest),
                "value": f"{idempotency.fingerprint} {record.task_id}",
            }
        if claim is not None and claim.source:
            task["claim"] = {"key": claim.key, "source": claim.source}
        elif claim is not None:
            task["claim"] = {"key": claim.key, "inputs": number_of(claim.payload, payloads)}
        if arrival.sharing is not None:
            task["sharing"] = arrival.sharing.fields(self._prefix, record.task_id)
        return task

    def earlier(self, idempotency: Idempotency) -> str | None:
        """Return the id of the task that an idempotency key has made, or None.

        Raises:
          KeyReused: the key belongs to another request.
        """
        value = self._redis.get(names.idempotency_key(self._prefix, idempotency.digest))
        return None if value is None else _made(cast(bytes, value), idempotency)

    def forget(self, task_id: str, idempotency: Idempotency | None) -> None:
        """Delete the record of a task that was never published, and free its idempotency key."""
        keys = [names.record_key(self._prefix, task_id)]
        if idempotency is not None:
            keys.append(names.idempotency_key(self._prefix, idempotency.digest))
        self._redis.delete(*keys)

    def begin(
        self, riders: Sequence[Rider], batch_id: str, *, alone: bool = False
    ) -> dict[str, Begun]:
        """Mark tasks as running, just before their forward pass, and count the attempt.

        Args:
          riders: the tasks of the batch, all of one version.
          batch_id: id of the batch.
          alone: whether the batch has one task, which may be a suspect.
        Returns:
          for each task id the verdict, and what is known of its attempts.
        """
        arguments = {
            "index": names.index_key(self._prefix),
            "counters": names.counters_key(self._prefix),
            "consumer": consumer_name(),
            "now": repr(time.time()),
            "batch": batch_id,
            "alone": alone,
            "model": riders[0].model,
            "version": str(riders[0].version),
            **self._lifetimes,
            "listed": self._tasks.listed,
            "riders": [self._riding(rider) for rider in riders],
        }
        replies = self._run(self._begin, arguments)
        return {
            rider.task_id: Begun(Verdict(verdict.decode()), attempts, lost, last.decode())
            for rider, (verdict, attempts, lost, last) in zip(riders, replies, strict=True)
        }

    def _riding(self, rider: Rider) -> dict[str, Any]:
        """Return a task as `begin.lua` takes it."""
        return {
            "id": rider.task_id,
            "record": names.record_key(self._prefix, rider.task_id),
            "accepted_at": repr(rider.accepted_at),
            "priority": str(rider.priority),
            **_entry(rider.held),
        }

    def claimed(self, task_ids: Sequence[str]) -> list[bytes | None]:
        """Return the packed inputs of tasks that have claims, None where they are gone.

        Args:
          task_ids: at least one.
        """
        keys = [names.claim_key(self._prefix, task_id) for task_id in task_ids]
        return cast(list[bytes | None], self._redis.mget(keys))

    def finish(
        self, steps: Sequence[Step], *, fenced: bool = True, then: Sequence[Command] = ()
    ) -> list[Verdict]:
        """Run the commands of tasks and settle their messages, all in one step.

        Args:
          steps: the commands of each task. The first one must be a command that a full Redis
            refuses, so that either all of a task's commands run or none.
          fenced: change only tasks whose message this process holds. Changes from outside, such as
            a cancellation, are not fenced; a full Redis takes them, because they make room.
          then: Redis commands that run once, if any task was changed; one that fails is ignored.
        Returns:
          the verdict on each task.
        """
        if not steps:
            return []
        payloads: list[bytes] = []
        arguments = {
            "counters": names.counters_key(self._prefix),
            **self._lifetimes,
            "steps": [
                {
                    "record": names.record_key(self._prefix, step.task_id),
                    "commands": [packable(command, payloads) for command in step.commands],
                    **_entry(step.held),
                }
                for step in steps
            ],
            "afterwards": [packable(command, payloads) for command in then],
        }
        if fenced:
            arguments["consumer"] = consumer_name()
        verdicts = cast(list[bytes], self._run(self._finish, arguments, payloads))
        return [Verdict(verdict.decode()) for verdict in verdicts]

    def _run(
        self, script: Script, arguments: Mapping[str, Any], payloads: Sequence[bytes] = ()
    ) -> Any:
        """Run a script; if Redis is full, delete the kept results and run it again."""
        try:
            return script.run(self._redis, arguments, payloads)
        except redis.ResponseError as exc:
            if not is_refusal(exc):
                raise
            try:
                made_room = self._kept_results.clear()
            except Exception:
                raise exc from None
            if not made_room:
                raise
            return script.run(self._redis, arguments, payloads)


def _entry(held: Held) -> dict[str, str]:
    """Return the fields of a message's entry; none on other brokers than Redis Streams."""
    return {"stream": held.stream, "entry": held.entry} if held.stream else {}


def _accepted(arrival: Arrival, answer: bytes, value: bytes) -> Admitted | Refusal:
    if answer == b"overloaded":
        error = Overloaded(f"{int(value)} tasks are ahead of it")
        error.waiting = int(value)
        return error
    if answer == b"outdated":
        return Outdated()
    if answer == b"gone":
        return PayloadGone("the inputs of the task have been deleted")
    if answer == b"made":
        assert arrival.idempotency is not None
        try:
            return Admitted(_made(value, arrival.idempotency))
        except KeyReused as reused:
            return reused
    return Admitted(arrival.record.task_id, decode_outcome(value) if answer == b"over" else None)


def _made(value: bytes, idempotency: Idempotency) -> str:
    """Return the task id from what is stored under an idempotency key.

    Raises:
      KeyReused: the key belongs to another request.
    """
    fingerprint, _, task_id = value.decode().partition(" ")
    if fingerprint != idempotency.fingerprint:
        raise KeyReused(
            "this Idempotency-Key was used for another request; choose a new one for each",
            "Idempotency-Key",
        )
    return task_id
