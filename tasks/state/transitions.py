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
from enum import Enum
from typing import Any, cast

import msgspec
import redis

from inferno import names
from inferno.errors import KeyReused, Overloaded, PayloadGone
from inferno.protocol.tasks import TERMINAL, TaskState
from inferno.settings import Settings
from tasks.broker.connection import is_refusal
from tasks.broker.lanes import Held
from tasks.state import sharing as cache
from tasks.state import statistics
from tasks.state.claims import Claim
from tasks.state.deployments import GENERATION, Outdated
from tasks.state.records import Outcome, Record, decode_outcome
from tasks.state.sharing import Sharing
from tasks.transport import consumer_name, scripts
from tasks.transport.script import InlineScript

#: A Redis command with its arguments, or one of these: ENQUEUE lane, priority, payload; DELAY lane,
#: due (ms), priority, payload; END result's key, payload, its time to live, that of the record,
#: state, time, how long its claimed inputs are still kept, and what the record says if there is
#: none; SHARE and DISBAND, of `tasks.state.sharing`; COUNT, of `tasks.state.statistics`.
Command = Sequence[Any]


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
    DONE = 1
    #: The task was over already; nothing has changed but that its message is gone.
    OVER = 0
    #: The message is no longer ours; nothing has changed.
    STALE = -1
    #: It may have ended its worker before: it has to run alone. Nothing has changed.
    SUSPECT = 2


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
        self._accept = InlineScript(_ACCEPT)
        self._begin = InlineScript(_BEGIN)
        self._finish = InlineScript(_FINISH)
        self._cache = cache.Cache(client, settings)

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
        keys = [
            names.index_key(self._prefix),
            names.deployments_key(self._prefix),
        ]
        arguments: list[Any] = [
            self._tasks.record_ttl_s,
            self._tasks.listed,
            self._tasks.idempotency_ttl_s,
            self._tasks.claim_ttl_s,
            GENERATION,
        ]
        for arrival in arrivals:
            record, idempotency = arrival.record, arrival.idempotency
            keys.append(names.record_key(self._prefix, record.task_id))
            key, made = "", ""
            if idempotency is not None:
                key = names.idempotency_key(self._prefix, idempotency.digest)
                made = f"{idempotency.fingerprint} {record.task_id}"
            keys.append(key)
            fields = record.fields()
            arguments += (
                record.task_id,
                record.accepted_at,
                made,
                arrival.lane,
                -1 if arrival.most_waiting is None else arrival.most_waiting,
                record.priority,
                arrival.payload,
                "" if arrival.generation is None else arrival.generation,
                2 * len(fields),
            )
            for item in fields.items():
                arguments += item
            if arrival.claim is None:
                arguments.append("")
            else:
                arguments += (arrival.claim.key, arrival.claim.payload, arrival.claim.source)
            if arrival.sharing is None:
                arguments.append(0)
            else:
                shared = arrival.sharing.arguments(
                    self._prefix, record.task_id, self._tasks.result_ttl_s
                )
                arguments += (len(shared), *shared)
        replies = cast(list[tuple[bytes, bytes]], self._run(self._accept, keys, arguments))
        return [
            _accepted(arrival, answer, value)
            for arrival, (answer, value) in zip(arrivals, replies, strict=True)
        ]

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
        arguments: list[Any] = [
            consumer_name(),
            time.time(),
            batch_id,
            self._tasks.record_ttl_s,
            self._tasks.listed,
            int(alone),
            riders[0].model,
            riders[0].version,
            self._tasks.claim_ttl_s,
        ]
        for rider in riders:
            arguments += (
                rider.held.stream,
                rider.held.entry,
                rider.task_id,
                rider.accepted_at,
                rider.priority,
            )
        keys = [names.index_key(self._prefix), names.counters_key(self._prefix)]
        keys += [names.record_key(self._prefix, rider.task_id) for rider in riders]
        replies = self._run(self._begin, keys, arguments)
        return {
            rider.task_id: Begun(Verdict(verdict), attempts, lost, last.decode())
            for rider, (verdict, attempts, lost, last) in zip(riders, replies, strict=True)
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
        arguments: list[Any] = [consumer_name() if fenced else ""]
        for step in steps:
            arguments += [step.held.stream, step.held.entry, len(step.commands)]
            for command in step.commands:
                arguments += [len(command), *command]
        arguments.append(len(then))
        for command in then:
            arguments += [len(command), *command]
        keys = [names.counters_key(self._prefix)]
        keys += [names.record_key(self._prefix, step.task_id) for step in steps]
        return [Verdict(code) for code in cast(list[int], self._run(self._finish, keys, arguments))]

    def _run(self, script: InlineScript, keys: list[str], arguments: list[Any]) -> Any:
        """Run a script; where Redis is full, kept results make room for it."""
        try:
            return script.run(self._redis, keys, arguments)
        except redis.ResponseError as exc:
            if not is_refusal(exc) and not isinstance(exc, redis.OutOfMemoryError):
                raise
            try:
                made_room = self._cache.clear()
            except Exception:
                raise exc from None
            if not made_room:
                raise
            return script.run(self._redis, keys, arguments)

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
          payload: as `tasks.state.records.encode_outcome`.
          keep_s: how long its claimed inputs, if there are any, are still kept, in seconds.
        """
        facts = [part for item in record.items() for part in item]
        return [
            [
                "END",
                names.result_key(task_id),
                payload,
                self._tasks.result_ttl_s,
                self._tasks.record_ttl_s,
                state,
                time.time(),
                keep_s,
                *facts,
            ]
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


_IS_OVER = "local over = {" + ", ".join(f"['{state}'] = true" for state in sorted(TERMINAL)) + "}\n"

#: KEYS: index, what is wanted of the models, then record and idempotency key of each
#: task. ARGV: see `accept`. Returns an answer and its value for each.
_ACCEPT = (
    scripts.LIBRARY
    + _IS_OVER
    + cache.ACCEPT
    + """
local function ahead(lane, priority)
  local count = 0
  for _, name in ipairs(STREAMS) do
    count = count + redis.call('XLEN', lane .. ':' .. name)
    if name == priority then
      break
    end
  end
  return count
end

local index = KEYS[1]
local ttl, listed, key_ttl, claim_ttl = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local generation = redis.call('HGET', KEYS[2], ARGV[5]) or '0'
local answers, lanes, newest = {}, {}, {}
local at = 6
for i = 3, #KEYS, 2 do
  local record, key = KEYS[i], KEYS[i + 1]
  local task_id, accepted_at, made = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local lane, priority, payload = ARGV[at + 3], ARGV[at + 5], ARGV[at + 6]
  local most, chosen, last = tonumber(ARGV[at + 4]), ARGV[at + 7], at + 8 + tonumber(ARGV[at + 8])
  -- The key of its inputs, if they have one; then these, or the key that they are copied from.
  local claim = ARGV[last + 1]
  local inputs, source = last + 2, claim ~= '' and ARGV[last + 3] or ''
  -- What it shares, if anything.
  local by = claim ~= '' and last + 5 or last + 3
  local shares = tonumber(ARGV[by - 1])
  local statistics = shares > 0 and ARGV[by + 5]
  local results, coalesce = shares > 0 and ARGV[by + 6] == '1', shares > 0 and ARGV[by + 7] == '1'
  local earlier = key ~= '' and redis.call('GET', key)
  local answer = {'accepted', ''}
  if earlier and earlier ~= made then
    answer = {'made', earlier}
  elseif redis.call('EXISTS', record) == 1 then
    -- Asked again, after it was over: nobody will be told any more.
    local payload = shares > 0 and redis.call('GET', ARGV[by + 8])
    answer = payload and {'over', payload} or answer
  elseif chosen ~= '' and chosen ~= generation then
    answer = {'outdated', ''}
  elseif source ~= '' and redis.call('EXISTS', source) == 0 then
    answer = {'gone', ''}
  else
    local text = results and kept(by)
    local leader = not text and coalesce and leader_of(by, priority)
    local count = 0
    if most >= 0 and lane ~= '' and not text and not leader then
      count = ahead(lane, priority)
    end
    if most >= 0 and count > most then
      answer = {'overloaded', tostring(count)}
    elseif text then
      answer = {'over', answer_with(text, task_id, '0.0', ',"cached":true', ARGV[by + 10])}
      redis.call('SET', ARGV[by + 8], answer[2], 'EX', ARGV[by + 9])
      redis.call('HSET', record, unpack(ARGV, at + 9, last))
      redis.call('HSET', record, 'state', 'succeeded', 'finished_at', accepted_at, 'cached', 1)
      redis.call('PUBLISH', ARGV[by + 8], answer[2])
      if ARGV[by + 12] ~= '' then
        append(ARGV[by + 11], 0, ARGV[by + 12])
        lanes[ARGV[by + 11]] = true
      end
      redis.call('HINCRBY', statistics, 'hit_count', 1)
    elseif lane ~= '' then
      local stream, entry
      if leader then
        stream, entry = follow(by, leader, record, ttl, task_id, accepted_at, lane, priority,
                               payload)
        redis.call('HINCRBY', statistics, 'coalesced_count', 1)
      else
        stream, entry = append(lane, priority, payload)
        lanes[lane] = true
        if coalesce then
          redis.call('SET', ARGV[by + 1] .. 'leader:' .. ARGV[by], record, 'EX', ttl)
        end
        if results then
          redis.call('HINCRBY', statistics, 'miss_count', 1)
        end
      end
      redis.call('HSET', record, 'stream', stream, 'entry', entry, unpack(ARGV, at + 9, last))
    else
      redis.call('HSET', record, unpack(ARGV, at + 9, last))
    end
    if answer[1] ~= 'overloaded' then
      redis.call('EXPIRE', record, ttl)
      newest[#newest + 1] = accepted_at
      newest[#newest + 1] = task_id
      if key ~= '' then
        redis.call('SET', key, made, 'EX', key_ttl)
      end
    end
    if claim ~= '' and answer[1] == 'accepted' then
      if source ~= '' then
        redis.call('COPY', source, claim)
        redis.call('EXPIRE', claim, claim_ttl)
      else
        redis.call('SET', claim, ARGV[inputs], 'EX', claim_ttl)
      end
      redis.call('HSET', record, 'claim', claim)
      -- While it waits, its record says what there is to delete.
      redis.call('EXPIRE', record, math.max(ttl, claim_ttl))
    end
  end
  answers[#answers + 1] = answer
  at = by + shares
end
if #newest > 0 then
  redis.call('ZADD', index, unpack(newest))
  redis.call('ZREMRANGEBYRANK', index, 0, -listed - 1)
end
for lane in pairs(lanes) do
  ring(lane)
end
return answers
"""
)

#: KEYS: index, counters, records. ARGV: see `begin`. Returns verdict, attempts, lost and batch of
#: each.
_BEGIN = (
    scripts.LIBRARY
    + _IS_OVER
    + """
local consumer, now, batch, ttl, listed = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local alone, model, version, claim_ttl = ARGV[6] == '1', ARGV[7], ARGV[8], ARGV[9]
local replies, held = {}, {}
for at = 10, #ARGV, 5 do
  hold(held, ARGV[at], ARGV[at + 1])
end
look_up(held, consumer)
for i = 3, #KEYS do
  local record, at = KEYS[i], 10 + 5 * (i - 3)
  local stream, entry = ARGV[at], ARGV[at + 1]
  local known = redis.call('HMGET', record, 'state', 'batch_id', 'attempts', 'lost', 'claim')
  local state, attempts, lost = known[1], tonumber(known[3] or 0), tonumber(known[4] or 0)
  if state == 'running' and known[2] ~= batch then
    lost = lost + 1
  end
  local verdict = 1
  if state and over[state] then
    verdict = 0
    if stream ~= '' and owned(stream, entry, consumer) then
      note_release(stream, entry)
    end
  elseif stream ~= '' and not owned(stream, entry, consumer) then
    verdict = -1
    redis.call('HINCRBY', KEYS[2], 'stale', 1)
  elseif state == 'running' and known[2] ~= batch and not alone then
    verdict = 2
  elseif known[2] ~= batch or state ~= 'running' then
    attempts = attempts + 1
    redis.call('HSET', record, 'state', 'running', 'started_at', now, 'batch_id', batch,
               'attempts', attempts, 'model', model, 'version', version)
    if lost > 0 then
      redis.call('HSET', record, 'lost', lost)
    end
    if not state then
      redis.call('HSET', record, 'accepted_at', ARGV[at + 3], 'priority', ARGV[at + 4])
      redis.call('ZADD', KEYS[1], ARGV[at + 3], ARGV[at + 2])
      redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -listed - 1)
    end
    -- Of one that was accepted a moment ago, it is set.
    if not state or now - ARGV[at + 3] > ttl / 2 then
      redis.call('EXPIRE', record, ttl)
    end
    if known[5] then
      redis.call('EXPIRE', known[5], claim_ttl)
    end
  end
  replies[#replies + 1] = {verdict, attempts, lost, verdict == 1 and batch or known[2] or ''}
end
release_noted()
return replies
"""
)

#: KEYS: counters, records. ARGV: consumer ("" for anyone); for each task its stream, entry, and
#: number of commands; for each of those its length and its parts; the same for what is done then.
#: Returns the verdicts.
_FINISH = (
    scripts.LIBRARY
    + _IS_OVER
    + statistics.FINISH
    + cache.FINISH
    + """
local consumer, at = ARGV[1], 2
local verdicts, replies, happened = {}, {}, false
if consumer ~= '' then
  local held, at = {}, 2
  for _ = 2, #KEYS do
    hold(held, ARGV[at], ARGV[at + 1])
    local count = ARGV[at + 2]
    at = at + 3
    for _ = 1, count do
      at = at + ARGV[at] + 1
    end
  end
  look_up(held, consumer)
end

-- The outcome of a task: stored, announced for whoever listens to this task, and collected for the
-- process that its client waits in.
local function announce(result, payload, ttl, reply_to)
  redis.call('SET', result, payload, 'EX', ttl)
  redis.call('PUBLISH', result, payload)
  if reply_to then
    replies[reply_to] = replies[reply_to] or {}
    table.insert(replies[reply_to], payload)
  end
end

local function finish(record, known, at, last)
  local result, payload, ttl, state, now, keep = ARGV[at], ARGV[at + 1], ARGV[at + 3],
                                                 ARGV[at + 4], ARGV[at + 5], ARGV[at + 6]
  announce(result, payload, ARGV[at + 2], known[2])
  redis.call('HSET', record, 'state', state, 'finished_at', now)
  if not known[1] then
    for i = at + 7, last, 2 do
      redis.call('HSETNX', record, ARGV[i], ARGV[i + 1])
    end
  end
  redis.call('EXPIRE', record, ttl)
  if known[3] and keep ~= '0' then
    redis.call('EXPIRE', known[3], keep)
  elseif known[3] then
    redis.call('UNLINK', known[3])
  end
end

for i = 2, #KEYS do
  local stream, entry, count = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  at = at + 3
  local known = redis.call('HMGET', KEYS[i], 'state', 'reply_to', 'claim')
  local state = known[1]
  local ours = stream == '' or consumer == '' or owned(stream, entry, consumer)
  local verdict = 1
  if state and over[state] then
    verdict = 0
  elseif not ours then
    verdict = -1
  end
  happened = happened or verdict == 1
  -- A cancellation takes the message away, too.
  if not ours and state ~= 'cancelled' then
    redis.call('HINCRBY', KEYS[1], 'stale', 1)
  end
  for _ = 1, count do
    local last = at + tonumber(ARGV[at])
    if verdict == 1 then
      local command = ARGV[at + 1]
      if command == 'END' then
        finish(KEYS[i], known, at + 2, last)
      elseif command == 'ENQUEUE' then
        enqueue(ARGV[at + 2], ARGV[at + 3], ARGV[at + 4])
      elseif command == 'DELAY' then
        delay(ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5])
      elseif command == 'SHARE' then
        share(at + 2, KEYS[i], announce)
      elseif command == 'DISBAND' then
        disband(at + 2, KEYS[i])
      elseif command == 'COUNT' then
        tally(ARGV[at + 2], ARGV[at + 3], ARGV[at + 4])
      else
        redis.call(unpack(ARGV, at + 1, last))
      end
    end
    at = last + 1
  end
  if ours and stream ~= '' then
    note_release(stream, entry)
  end
  verdicts[#verdicts + 1] = verdict
end
release_noted()
if happened then
  write_counted()
  for _ = 1, tonumber(ARGV[at]) do
    local last = at + 1 + tonumber(ARGV[at + 1])
    note(unpack(ARGV, at + 2, last))
    at = last
  end
end
-- Once to each process, however many of its tasks were in the batch: an array of outcomes.
for reply_to, payloads in pairs(replies) do
  payloads[1] = '[' .. payloads[1]
  payloads[#payloads] = payloads[#payloads] .. ']'
  redis.call('PUBLISH', reply_to, table.concat(payloads, ','))
end
return verdicts
"""
)
