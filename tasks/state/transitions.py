"""The changes of a task's state, each one atomic step of Redis.

    accept   record, idempotency key and message appear together, or not at all
    begin    QUEUED or RETRYING -> RUNNING, just before a forward pass; counts the attempt
    finish   what else happens to a task, with the acknowledgement of its message

A task whose inputs equal another one's may be over when it is accepted, or wait for that one to be
finished; see `tasks.state.sharing`.

Two guards make a task's outcome its only one. The record: what is over stays as it is. The fence:
a worker whose entries were taken over, because it was thought dead, changes nothing any more. (On
brokers other than Redis Streams the record is the only guard, and messages are acknowledged after.)

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
from inferno.protocol.tasks import TaskState
from inferno.settings import Settings
from tasks.broker.connection import is_refusal
from tasks.broker.lanes import Held
from tasks.state.claims import Claim
from tasks.state.deployments import GENERATION, Outdated
from tasks.state.kept_results import Cache
from tasks.state.outcomes import Outcome, decode_outcome
from tasks.state.records import Record
from tasks.state.sharing import MOST_FOLLOWERS, Sharing
from tasks.transport import consumer_name
from tasks.transport.script import Script

#: A Redis command with its arguments, or a table that `lua/finish.lua` describes.
Command = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Idempotency:
    """The Idempotency-Key of a request."""

    #: Of the key, with whatever limits its scope.
    digest: str
    #: Of the request's body: the same key must not come with another one.
    fingerprint: str


class Arrival(msgspec.Struct, frozen=True):
    """A task that asks to be accepted."""

    #: In its first state.
    record: Record
    #: As `Lanes.key`; "" leaves the publishing to the caller.
    lane: str
    #: As `Lanes.pack`.
    payload: bytes
    #: Makes the task once, however often it is asked for.
    idempotency: Idempotency | None = None
    #: Refuse if more tasks are ahead of it: they wait in its lane or are in workers' hands, with
    #: the same priority or a higher one.
    most_waiting: int | None = None
    #: Whose result it may be answered with, if anyone's.
    sharing: Sharing | None = None
    #: Its inputs, where they are not in its message.
    claim: Claim | None = None
    #: Refuse if this is no longer the generation of what is wanted of the models.
    generation: int | None = None


class Admitted(msgspec.Struct, frozen=True):
    """A task that is accepted."""

    #: An earlier one's when its idempotency key has made that already.
    task_id: str
    #: Of a task that was over at once.
    outcome: Outcome | None = None


#: Why a task is not accepted.
Refusal = Overloaded | KeyReused | PayloadGone | Outdated


class Verdict(Enum):
    """What became of a transition."""

    #: It happened.
    DONE = "done"
    #: The task was over already; nothing has changed but that its message is gone.
    OVER = "over"
    #: The message is no longer ours; nothing has changed.
    STALE = "stale"
    #: It may have ended its worker before: it has to run alone. Nothing has changed.
    SUSPECT = "suspect"


class Begun(msgspec.Struct, frozen=True):
    """The answer to `Transitions.begin` for one task."""

    verdict: Verdict
    #: Forward passes that have started with the task in it, this one included.
    attempts: int
    #: Those of them that never ended, because the worker did.
    lost: int
    #: The batch of the last of them.
    batch_id: str


class Rider(msgspec.Struct, frozen=True):
    """A task that is about to ride in a batch."""

    task_id: str
    held: Held
    #: To be written where there is no record: another client sent it.
    model: str
    version: int
    accepted_at: float
    priority: int


class Step(msgspec.Struct, frozen=True):
    """Commands that happen to one task together, and settle its message."""

    task_id: str
    held: Held
    commands: list[Command] = msgspec.field(default_factory=list)


class Transitions:
    """Changes tasks; every change is one round trip."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Prepare the scripts.

        Args:
          client: answers in bytes, and does not retry by itself.
          settings: prefix and lifetimes.
        """
        self._redis = client
        self._prefix = settings.redis.prefix
        self._tasks = settings.tasks
        # As text: to write a number costs Lua more than all else that it does with one.
        self._lifetimes = {
            "record_ttl_s": str(self._tasks.record_ttl_s),
            "result_ttl_s": str(self._tasks.result_ttl_s),
            "claim_ttl_s": str(self._tasks.claim_ttl_s),
            "idempotency_ttl_s": str(self._tasks.idempotency_ttl_s),
        }
        self._accept = Script("tasks.state", "accept")
        self._begin = Script("tasks.state", "begin")
        self._finish = Script("tasks.state", "finish")
        self._cache = Cache(client, settings)

    def accept(self, arrivals: Sequence[Arrival]) -> list[Admitted | Refusal]:
        """Write the records of new tasks and publish their messages, all in one step.

        To repeat it with the same records adds nothing, so that it may be tried again when the
        connection was lost before the answer.

        Args:
          arrivals: each its own task.
        Returns:
          for each its task, or why it is refused.
        Raises:
          redis.RedisError: Redis does not take them, or it is unknown whether it did.
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
            "facts": _in_turn(record.fields()),
            "priority": str(record.priority),
        }
        if arrival.lane:
            task |= {"lane": arrival.lane, "message": _number(arrival.payload, payloads)}
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
            task["claim"] = {"key": claim.key, "inputs": _number(claim.payload, payloads)}
        if arrival.sharing is not None:
            task["sharing"] = arrival.sharing.fields(self._prefix, record.task_id)
        return task

    def earlier(self, idempotency: Idempotency) -> str | None:
        """Return the id of the task that an idempotency key has made, or None.

        Raises:
          KeyReused: it has made a task of another request.
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
          batch_id: of the batch they ride in.
          alone: it is only one, so that it may be a suspect.
        Returns:
          by task id, whether it shall run.
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
        """Return the inputs of tasks that are not in their messages, None for those that are gone.

        Args:
          task_ids: at least one.
        """
        keys = [names.claim_key(self._prefix, task_id) for task_id in task_ids]
        return cast(list[bytes | None], self._redis.mget(keys))

    def finish(
        self, steps: Sequence[Step], *, fenced: bool = True, then: Sequence[Command] = ()
    ) -> list[Verdict]:
        """Do what shall happen to tasks, and settle their messages, for each in one step.

        Args:
          steps: for each task its commands; the first must be one that Redis refuses when it is
            full, so that nothing happens by halves.
          fenced: only for those whose message is in this process' hands. Unfenced is for changes
            that come from outside, such as a cancellation.
          then: commands of Redis for all of them together, if anything has happened to any; that
            one of these fails changes nothing else.
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
                    "commands": [_packable(command, payloads) for command in step.commands],
                    **_entry(step.held),
                }
                for step in steps
            ],
            "afterwards": [_packable(command, payloads) for command in then],
        }
        if fenced:
            arguments["consumer"] = consumer_name()
        verdicts = cast(list[bytes], self._run(self._finish, arguments, payloads))
        return [Verdict(verdict.decode()) for verdict in verdicts]

    def _run(
        self, script: Script, arguments: Mapping[str, Any], payloads: Sequence[bytes] = ()
    ) -> Any:
        """Run a script; where Redis is full, kept results make room for it."""
        try:
            return script.run(self._redis, arguments, payloads)
        except redis.ResponseError as exc:
            if not is_refusal(exc) and not isinstance(exc, redis.OutOfMemoryError):
                raise
            try:
                made_room = self._cache.clear()
            except Exception:
                raise exc from None
            if not made_room:
                raise
            return script.run(self._redis, arguments, payloads)

    # What may happen to a task

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
          record: fields to write if there is no record.
          task_id: whose outcome it is.
          state: one of the terminal ones.
          payload: as `tasks.state.outcomes.encode_outcome`.
          keep_s: how long its claimed inputs, if there are any, are still kept, in seconds.
        """
        return [
            {
                "kind": "end",
                "result": names.result_key(task_id),
                "outcome": payload,
                "state": state,
                "finished_at": repr(time.time()),
                **({"keep_inputs_s": keep_s} if keep_s else {}),
                **({"facts": _in_turn(record)} if record else {}),
            }
        ]

    def retried(self, task_id: str, retries: int, due: float) -> list[Command]:
        """Return the commands that let a task wait for its next attempt.

        Args:
          task_id: which.
          retries: attempts after the first, the next one included.
          due: when it may begin; seconds since the epoch.
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
            # The letters themselves expire by their own time to live.
            ["ZREMRANGEBYSCORE", index, "-inf", now - self._tasks.dead_ttl_s],
            ["HINCRBY", names.counters_key(self._prefix), "dead", 1],
        ]

    def kept(self, task_id: str, payload: bytes) -> list[Command]:
        """Return the commands that keep what a finished task was asked."""
        key = names.payload_key(self._prefix, task_id)
        return [["SET", key, payload, "EX", self._tasks.result_ttl_s]]


def _entry(held: Held) -> dict[str, str]:
    """Return a message as scripts take it: nothing where the broker has no streams."""
    return {"stream": held.stream, "entry": held.entry} if held.stream else {}


def _in_turn(fields: Mapping[str, Any]) -> list[str | bytes]:
    """Return names and values in turn, as HSET takes them."""
    return [_text(part) for item in fields.items() for part in item]


def _packable(command: Command, payloads: list[bytes]) -> Command:
    """Return a command as `finish.lua` takes it, and append its payloads."""
    if not isinstance(command, Mapping):
        return [_text(part) for part in command]
    return {
        name: _number(value, payloads) if isinstance(value, bytes) else value
        for name, value in command.items()
    }


def _number(payload: bytes, payloads: list[bytes]) -> int:
    """Append a payload, and return the number by which the script gets it."""
    payloads.append(payload)
    return len(payloads)


def _text(value: str | bytes | float) -> str | bytes:
    """Return a value as Redis stores it. Lua would write a number with only 14 digits."""
    return value if isinstance(value, str | bytes) else repr(value)


def _accepted(arrival: Arrival, answer: bytes, value: bytes) -> Admitted | Refusal:
    if answer == b"overloaded":
        error = Overloaded(f"{int(value)} tasks are ahead of it")
        error.waiting = int(value)
        return error
    if answer == b"outdated":
        return Outdated()
    if answer == b"gone":
        return PayloadGone("what the task was asked has been deleted")
    if answer == b"made":
        assert arrival.idempotency is not None
        try:
            return Admitted(_made(value, arrival.idempotency))
        except KeyReused as reused:
            return reused
    return Admitted(arrival.record.task_id, decode_outcome(value) if answer == b"over" else None)


def _made(value: bytes, idempotency: Idempotency) -> str:
    """Return the task of what is stored under an idempotency key."""
    fingerprint, _, task_id = value.decode().partition(" ")
    if fingerprint != idempotency.fingerprint:
        raise KeyReused(
            "this Idempotency-Key was used for another request; choose a new one for each",
            "Idempotency-Key",
        )
    return task_id
