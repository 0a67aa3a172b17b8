"""The Lua scripts of the stream transport.

Each runs as one atomic step. They name keys that are computed from the lane's key, so they are not
for Redis Cluster. Times are those of Redis' own clock, in milliseconds.

`LIBRARY` may stand before other scripts, which can then publish, settle and delay messages in the
same atomic step as writes of their own; see `Lane` for the keys.
"""

from __future__ import annotations

#: The consumer group of every stream.
GROUP = "workers"

#: The streams of a lane, in the order in which they are handed out.
STREAMS = ("returned", *"9876543210")

#: Local functions for scripts; `lane` is `Lane.key`, `entry` an id within `stream`.
LIBRARY = (
    f"local GROUP = '{GROUP}'\n"
    "local STREAMS = {'"
    + "', '".join(STREAMS)
    + "'}\n"
    + """

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Wake one waiting consumer. The bell is a list, of one element as a rule: who takes it, fetches.
local function ring(lane)
  if redis.call('EXISTS', lane .. ':bell') == 0 then
    redis.call('LPUSH', lane .. ':bell', 1)
  end
end

-- Append a message, for who rings afterwards; returns the stream's key and the entry's id.
local function append(lane, priority, payload)
  local stream = lane .. ':' .. priority
  return stream, redis.call('XADD', stream, '*', 'message', payload)
end

-- Append a message, and wake a consumer.
local function enqueue(lane, priority, payload)
  append(lane, priority, payload)
  ring(lane)
end

-- Append a message at a later time.
local function delay(lane, due_ms, priority, payload)
  redis.call('ZADD', lane .. ':delayed', due_ms, priority .. payload)
end

-- Entries of which `look_up` has found that they are in the hands of the asking consumer.
local found = {}

-- Whether an entry is in the hands of this very consumer.
local function owned(stream, entry, consumer)
  if found[stream] and found[stream][entry] then
    return true
  end
  local pending = redis.pcall('XPENDING', stream, GROUP, entry, entry, 1, consumer)
  return not pending.err and #pending > 0
end

-- Find out about many entries at once, for `owned` to be asked of each: `held` has those of each
-- stream. Those of a batch stand together in their stream, so that a little more than their number
-- is asked for, from the first one on. The order of text is not always theirs; what is not found is
-- looked for by itself.
local function look_up(held, consumer)
  for stream, entries in pairs(held) do
    local first = entries[1]
    for _, entry in ipairs(entries) do
      if entry < first then
        first = entry
      end
    end
    local pending = redis.pcall('XPENDING', stream, GROUP, first, '+', #entries + 8, consumer)
    local ours = {}
    if not pending.err then
      for _, item in ipairs(pending) do
        ours[item[1]] = true
      end
    end
    found[stream] = ours
  end
end

-- Add an entry to those that `look_up` is asked about.
local function hold(held, stream, entry)
  if stream ~= '' then
    local entries = held[stream] or {}
    held[stream] = entries
    entries[#entries + 1] = entry
  end
end

-- Acknowledge and delete an entry, whoever has it.
local function release(stream, entry)
  redis.pcall('XACK', stream, GROUP, entry)
  redis.call('XDEL', stream, entry)
end

-- Note an entry, for `release_noted` to acknowledge and delete all of a stream together.
local noted = {}
local function note_release(stream, entry)
  local entries = noted[stream] or {}
  noted[stream] = entries
  entries[#entries + 1] = entry
end

local function release_noted()
  for stream, entries in pairs(noted) do
    redis.pcall('XACK', stream, GROUP, unpack(entries))
    redis.call('XDEL', stream, unpack(entries))
  end
end

-- Messages that are waiting, delayed or in someone's hands.
local function backlog(lane)
  local count = redis.call('ZCARD', lane .. ':delayed')
  for _, name in ipairs(STREAMS) do
    count = count + redis.call('XLEN', lane .. ':' .. name)
  end
  return count
end
"""
)
