"""Work that is done once: kept results, and tasks in flight that share one computation.

Tasks with equal inputs, for the same content of the same version, have the same *shared key*. When
one of them is accepted, the script that does so

    finds a kept result    and settles the task in the same step, or
    finds a leader         a task with that key that waits or runs, and lets this one follow it, or
    puts it into its lane  where it leads those that come after it.

The script that settles a leader settles its followers, too, and keeps the result. When a leader
ends in any other way, its followers are put into their lane, each for itself: nobody's fate depends
on another client's deadline or cancellation. A follower's message is an entry of a stream, as one
in a lane is, so that it is cancelled and expires in the same way.

Keys, behind `names.cache_keys`:

    kept:<key>       a result without its ending, see `text_for_others`
    index, sizes     shared keys of the kept results, by the time when they expire; their bytes
    leader:<key>     the key of the leader's record
    followers:<key>  a stream: what each follower asks, and how it is to be told
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import redis

from inferno import names
from inferno.protocol.digest import digest
from inferno.protocol.tensors import Tensors
from inferno.repository.repository import Package
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.transport.script import InlineScript

#: Tasks that follow one leader, at most: one step settles them all.
MOST_FOLLOWERS = 1000


@dataclass(frozen=True)
class Sharing:
    """How a task may be answered with another one's result."""

    #: Equal for tasks whose results are interchangeable.
    key: str
    #: `<model>/<version>`, and `Package.digest` as this process has read it.
    package: str
    digest: str
    model: str
    version: int
    #: Whether a kept result will do, and whether that of a task in flight.
    results: bool
    coalesce: bool
    #: The packed message of its webhook for `completed`, and the lane that takes it.
    webhook: bytes | None = None
    webhook_lane: str = ""

    @classmethod
    def of(
        cls, package: Package, inputs: Tensors, outputs: Sequence[str] | None, codec: str | None
    ) -> Sharing | None:
        """Return how a task of a version shares, or None when the version does not.

        Args:
          package: the version.
          inputs: as `Signature.parse` returns them.
          outputs: those that the client wants; None for all.
          codec: how it wants numbers to be written; None for what the package says.
        """
        if not (package.keeps_results or package.coalesces):
            return None
        written = codec or package.manifest.codecs.default
        wanted = "" if outputs is None else ",".join(sorted(set(outputs)))
        place = f"{package.name}/{package.version}"
        return cls(
            key=f"{place}/{package.digest}/{digest(inputs)}/{written}/{wanted}",
            package=place,
            digest=package.digest,
            model=package.name,
            version=package.version,
            results=package.keeps_results,
            coalesce=package.coalesces,
        )

    def arguments(self, prefix: str, task_id: str, result_ttl_s: int) -> list[Any]:
        """Return what the script that accepts a task is told of this."""
        return [
            self.key,
            names.cache_keys(prefix),
            names.packages_key(prefix),
            self.package,
            self.digest,
            names.statistics_key(prefix, self.model, self.version),
            int(self.results),
            int(self.coalesce),
            names.result_key(task_id),
            result_ttl_s,
            datetime.now(UTC).isoformat(),
            self.webhook_lane,
            self.webhook or b"",
        ]


class _Parts(msgspec.Struct):
    """Of a stored result, what is the same for all whom it answers."""

    outputs: msgspec.Raw
    model: msgspec.Raw
    version: msgspec.Raw
    batch: msgspec.Raw
    worker: msgspec.Raw


class _Payload(msgspec.Struct):
    result: _Parts


_decode_payload = msgspec.json.Decoder(_Payload).decode


def text_for_others(payload: bytes) -> bytes:
    """Return the beginning of a result, which scripts end with another task's own times.

    Args:
      payload: the outcome of a task that succeeded, as `tasks.state.records.encode_outcome`.
    """
    parts = _decode_payload(payload).result
    return (
        b'{"outputs":%b,"model":%b,"version":%b,"batch":%b,"worker":%b,'
        b'"timings":{"batch_wait_ms":0.0,"inference_ms":0.0,"queue_ms":'
        % (parts.outputs, parts.model, parts.version, parts.batch, parts.worker)
    )


class Sharer:
    """Says what happens to others when a task is over, as commands of `Transitions.finish`."""

    def __init__(self, settings: Settings) -> None:
        """Store the limits of what is kept."""
        self._prefix = settings.redis.prefix
        self._keys = names.cache_keys(settings.redis.prefix)
        self._cache = settings.cache
        self._result_ttl_s = settings.tasks.result_ttl_s
        self._record_ttl_s = settings.tasks.record_ttl_s

    def succeeded(
        self, package: Package, arguments: Mapping[str, Any], payload: bytes
    ) -> list[list[Any]]:
        """Return the commands that keep a result and answer the followers with it.

        Args:
          package: that gave it.
          arguments: of the task's message.
          payload: its outcome.
        """
        key = self._key(arguments)
        if key is None:
            return []
        if not (package.keeps_results or package.coalesces):
            return self.disbanded(key)
        text, now = text_for_others(payload), datetime.now(UTC)
        ttl_ms = 0
        # The web tier may have read another content of this version than this worker has.
        current = package.keeps_results and key.startswith(
            f"{package.name}/{package.version}/{package.digest}/"
        )
        if current and len(text) <= self._cache.max_result_bytes:
            ttl_ms = round(1000 * (package.manifest.cache.ttl_s or self._cache.ttl_s))
        return [
            [
                "SHARE",
                self._keys,
                key,
                text,
                max(ttl_ms, int(ttl_ms > 0)),
                self._cache.max_entries,
                self._cache.max_bytes,
                self._result_ttl_s,
                self._record_ttl_s,
                now.isoformat(),
                now.timestamp(),
                names.statistics_key(self._prefix, package.name, package.version),
            ]
        ]

    def ended(self, package: Package, arguments: Mapping[str, Any]) -> list[list[Any]]:
        """Return the commands that let followers run for themselves."""
        key = self._key(arguments)
        return [] if key is None else self.disbanded(key)

    def disbanded(self, key: str) -> list[list[Any]]:
        """Return the commands that let the followers of a shared key run for themselves."""
        return [["DISBAND", self._keys, key]]

    def _key(self, arguments: Mapping[str, Any]) -> str | None:
        # The web tier has decided it, and its package may have said something else than ours does:
        # whoever follows is not to be forgotten.
        key = arguments.get("cache")
        return key if isinstance(key, str) else None


class Cache:
    """What is kept, for operators."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where it is."""
        self._redis = client
        self._keys = names.cache_keys(settings.redis.prefix)
        self._clear = InlineScript(CLEAR)

    def size(self) -> tuple[int, int]:
        """Return how many results are kept, and their bytes together.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            pipe.zcard(f"{self._keys}index")
            pipe.hget(f"{self._keys}sizes", "")
            entries, size = pipe.execute()
        return entries, int(size or 0)

    def clear(self, model: str | None = None) -> int:
        """Forget the kept results, of one model or of all; returns how many there were.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        beginning = "" if model is None else f"{model}/"
        with translated():
            return int(self._clear.run(self._redis, [self._keys], [beginning]))


#: Forgets kept results; `base` is `names.cache_keys`.
_FORGET = """
local function forget(base, kept)
  for _, key in ipairs(kept) do
    redis.call('UNLINK', base .. 'kept:' .. key)
    redis.call('ZREM', base .. 'index', key)
    local size = redis.call('HGET', base .. 'sizes', key)
    if size then
      redis.call('HDEL', base .. 'sizes', key)
      redis.call('HINCRBY', base .. 'sizes', '', -size)
    end
  end
end
"""

#: KEYS: `names.cache_keys`. ARGV: what the shared keys begin with. Returns how many were forgotten.
CLEAR = (
    _FORGET
    + """
local base, start, gone = KEYS[1], ARGV[1], {}
for _, key in ipairs(redis.call('ZRANGE', base .. 'index', 0, -1)) do
  if key:sub(1, #start) == start then
    gone[#gone + 1] = key
  end
end
forget(base, gone)
return #gone
"""
)

#: The payload of another task that is answered with a kept text; `ms` is what it has waited.
_ANSWER = """
local function answer_with(text, task_id, ms, ending, date)
  return '{"task_id":"' .. task_id .. '","status":"SUCCESS","result":' .. text .. ms
         .. ',"total_ms":' .. ms .. '}' .. ending
         .. '},"traceback":null,"children":[],"date_done":"' .. date .. '"}'
end
"""

#: For the script that accepts tasks. `at` is where `Sharing.arguments` begin in ARGV.
ACCEPT = (
    _ANSWER
    + f"local MOST_FOLLOWERS = {MOST_FOLLOWERS}\n"
    + """
-- The kept text for a task, if workers have loaded what the caller has read.
local function kept(at)
  local base, key = ARGV[at + 1], ARGV[at]
  if redis.call('HGET', ARGV[at + 2], ARGV[at + 3]) ~= ARGV[at + 4] then
    return false
  end
  return redis.call('GET', base .. 'kept:' .. key)
end

-- The record of a task that a new one of some priority may follow.
local function leader_of(at, priority)
  local base, key = ARGV[at + 1], ARGV[at]
  local record = redis.call('GET', base .. 'leader:' .. key)
  if not record or redis.call('XLEN', base .. 'followers:' .. key) >= MOST_FOLLOWERS then
    return false
  end
  local known = redis.call('HMGET', record, 'state', 'priority', 'stream', 'entry')
  if not known[3] or over[known[1]] or tonumber(known[2]) < tonumber(priority) then
    return false
  end
  -- Whose message has been taken away, or put elsewhere to be tried again, is not waited for.
  return #redis.call('XRANGE', known[3], known[4], known[4]) > 0 and record
end

-- Let a task wait for its leader; returns where its message is.
local function follow(at, leader, record, ttl, task_id, accepted_at, lane, priority, payload)
  local base, key = ARGV[at + 1], ARGV[at]
  local stream = base .. 'followers:' .. key
  -- First, because a full Redis refuses this.
  local entry = redis.call('XADD', stream, '*', 'message', payload, 'record', record,
                           'task_id', task_id, 'result', ARGV[at + 8],
                           'accepted_at', accepted_at, 'lane', lane, 'priority', priority,
                           'webhook_lane', ARGV[at + 11], 'webhook', ARGV[at + 12])
  -- It is forgotten no sooner than those who follow it.
  redis.call('EXPIRE', leader, ttl)
  redis.call('EXPIRE', base .. 'leader:' .. key, ttl)
  return stream, entry
end
"""
)

#: For the script that settles tasks. `at` is where the arguments of a command begin in ARGV.
FINISH = (
    _FORGET
    + _ANSWER
    + """
local function each_follower(base, key, visit)
  local stream = base .. 'followers:' .. key
  local rung = {}
  for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+')) do
    local task = {}
    for i = 1, #entry[2], 2 do
      task[entry[2][i]] = entry[2][i + 1]
    end
    local known = redis.call('HMGET', task.record, 'state', 'reply_to', 'claim')
    if not (known[1] and over[known[1]]) then
      local lane = visit(task, known)
      if lane and lane ~= '' then
        rung[lane] = true
      end
    end
  end
  redis.call('DEL', stream)
  for lane in pairs(rung) do
    ring(lane)
  end
end

-- Keep a result, for a number of them and of bytes together.
local function keep(at, now)
  local base, key, text, ttl_ms = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  local most, most_bytes = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5])
  local index, sizes = base .. 'index', base .. 'sizes'
  if #text > most_bytes then
    return
  end
  forget(base, {key})
  forget(base, redis.call('ZRANGEBYSCORE', index, '-inf', now * 1000, 'LIMIT', 0, 8))
  redis.call('SET', base .. 'kept:' .. key, text, 'PX', ttl_ms)
  redis.call('ZADD', index, now * 1000 + ttl_ms, key)
  redis.call('HSET', sizes, key, #text)
  redis.call('HINCRBY', sizes, '', #text)
  -- A few at a time; those go first that would expire first.
  for _ = 1, 8 do
    if redis.call('ZCARD', index) <= most
       and tonumber(redis.call('HGET', sizes, '')) <= most_bytes then
      break
    end
    forget(base, redis.call('ZRANGE', index, 0, 0))
  end
end

-- Answer all who wait for a result with this one; `announce` stores and tells it.
local function share(at, record, announce)
  local base, key, text, now = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 9]
  if tonumber(ARGV[at + 3]) > 0 then
    keep(at, now)
  end
  redis.call('DEL', base .. 'leader:' .. key)
  local batch = redis.call('HGET', record, 'batch_id')
  local followers, waited_s = 0, 0
  each_follower(base, key, function(task, known)
    local s = math.max(now - tonumber(task.accepted_at), 0)
    local ms = string.format('%.3f', s * 1000)
    followers, waited_s = followers + 1, waited_s + s
    announce(task.result, answer_with(text, task.task_id, ms, '', ARGV[at + 8]), ARGV[at + 6],
             known[2])
    if known[1] then
      redis.call('HSET', task.record, 'state', 'succeeded', 'finished_at', now)
      if batch then
        redis.call('HSET', task.record, 'batch_id', batch)
      end
      redis.call('EXPIRE', task.record, ARGV[at + 7])
    end
    if known[3] then
      redis.call('UNLINK', known[3])
    end
    if task.webhook ~= '' then
      append(task.webhook_lane, 0, task.webhook)
      return task.webhook_lane
    end
  end)
  if followers > 0 then
    note('HINCRBY', ARGV[at + 10], 'shared_count', followers)
    note('HINCRBY', ARGV[at + 10], 'shared_ns', string.format('%.0f', waited_s * 1e9))
  end
end

-- Let those who waited for a task run for themselves, unless they wait for another one by now.
local function disband(at, record)
  local base, key = ARGV[at], ARGV[at + 1]
  local leader = redis.call('GET', base .. 'leader:' .. key)
  if leader and leader ~= record then
    return
  end
  redis.call('DEL', base .. 'leader:' .. key)
  each_follower(base, key, function(task, known)
    local stream, entry = append(task.lane, task.priority, task.message)
    if known[1] then
      redis.call('HSET', task.record, 'stream', stream, 'entry', entry)
    end
    return task.lane
  end)
end
"""
)
