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

#: KEYS: lane. ARGV: priority, due (ms, or 0 for now), payload.
PUBLISH = (
    LIBRARY
    + """
if tonumber(ARGV[2]) > now_ms() then
  delay(KEYS[1], ARGV[2], ARGV[1], ARGV[3])
else
  enqueue(KEYS[1], ARGV[1], ARGV[3])
end
"""
)

#: KEYS: lane. ARGV: consumer, lease (ms), most messages. Returns {stream, entry, payload} for each.
FETCH = (
    LIBRARY
    + """
local lane, consumer, left = KEYS[1], ARGV[1], tonumber(ARGV[3])
local fetched = {}
-- From the first message on it must be known that there is someone who could die. (A full Redis
-- refuses HSETNX also when it would do nothing.)
if redis.call('HEXISTS', lane .. ':consumers', consumer) == 0 then
  redis.call('HSET', lane .. ':consumers', consumer, now_ms() .. ' ' .. ARGV[2])
end
if redis.call('EXISTS', lane .. ':paused') == 1 then
  return fetched
end
local function read(stream)
  local reply = redis.pcall('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', left,
                            'STREAMS', stream, '>')
  if reply and reply.err then
    -- The stream is new, or was deleted together with its group.
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
    return read(stream)
  end
  return reply and reply[1][2] or {}
end
for _, name in ipairs(STREAMS) do
  local stream = lane .. ':' .. name
  if left > 0 and redis.call('XLEN', stream) > 0 then
    for _, entry in ipairs(read(stream)) do
      fetched[#fetched + 1] = {stream, entry[1], entry[2][2]}
      left = left - 1
    end
  end
end
if left <= 0 then
  ring(lane)  -- There may be more, for someone else.
end
return fetched
"""
)

#: What is in a consumer's own hands already. KEYS: lane. ARGV: consumer. Returns as FETCH.
HELD = (
    LIBRARY
    + """
local held = {}
for _, name in ipairs(STREAMS) do
  local stream = KEYS[1] .. ':' .. name
  local reply = redis.pcall('XREADGROUP', 'GROUP', GROUP, ARGV[1], 'STREAMS', stream, '0')
  if reply and not reply.err then
    for _, entry in ipairs(reply[1][2]) do
      if entry[2] then
        held[#held + 1] = {stream, entry[1], entry[2][2]}
      else
        redis.call('XACK', stream, GROUP, entry[1])  -- Deleted meanwhile.
      end
    end
  end
end
return held
"""
)

#: Say that a consumer lives, and put what is due into its stream. KEYS: lanes. ARGV: consumer,
#: lease (ms). Returns the time, and for each lane a flat list of consumers and their reports.
TEND = (
    LIBRARY
    + """
local now = now_ms()
local consumers = {}
for i, lane in ipairs(KEYS) do
  consumers[i] = redis.call('HGETALL', lane .. ':consumers')
  redis.call('HSET', lane .. ':consumers', ARGV[1], now .. ' ' .. ARGV[2])
  local due = redis.call('ZRANGEBYSCORE', lane .. ':delayed', '-inf', now, 'LIMIT', 0, 1000)
  for _, message in ipairs(due) do
    enqueue(lane, message:sub(1, 1), message:sub(2))
    redis.call('ZREM', lane .. ':delayed', message)
  end
end
return {now, consumers}
"""
)

#: Take over what a dead consumer held. KEYS: lane. ARGV: the dead, its report as it was when it was
#: found dead, consumer, most messages. Returns as FETCH.
CLAIM = (
    LIBRARY
    + """
local lane, dead, report, consumer, left = KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local claimed = {}
if redis.call('HGET', lane .. ':consumers', dead) ~= report then
  return claimed  -- It is back, or someone else has taken over.
end
for _, name in ipairs(STREAMS) do
  local stream = lane .. ':' .. name
  local pending = {}
  if left > 0 then
    pending = redis.pcall('XPENDING', stream, GROUP, '-', '+', left, dead)
  end
  for _, item in ipairs(pending) do
    local reply = redis.call('XCLAIM', stream, GROUP, consumer, 0, item[1])
    local entry = reply[1]
    if entry and entry[2] then
      claimed[#claimed + 1] = {stream, entry[1], entry[2][2]}
      left = left - 1
    else
      redis.call('XACK', stream, GROUP, item[1])  -- Deleted meanwhile.
    end
  end
end
local rest = 0
for _, name in ipairs(STREAMS) do
  local stream = lane .. ':' .. name
  local pending = redis.pcall('XPENDING', stream, GROUP, '-', '+', 1, dead)
  rest = rest + #pending
  if #pending == 0 then
    -- Only then: deleting a consumer discards what it still holds.
    redis.pcall('XGROUP', 'DELCONSUMER', stream, GROUP, dead)
  end
end
if rest == 0 then
  redis.call('HDEL', lane .. ':consumers', dead)
end
return claimed
"""
)

#: Acknowledge entries. ARGV: consumer, then stream and entry of each. Returns how many were ours.
RELEASE = (
    LIBRARY
    + """
local count = 0
for i = 2, #ARGV, 2 do
  if owned(ARGV[i], ARGV[i + 1], ARGV[1]) then
    release(ARGV[i], ARGV[i + 1])
    count = count + 1
  end
end
return count
"""
)

#: Give a message back to the end of its line. KEYS: lane. ARGV: consumer, stream, entry, priority,
#: payload.
REQUEUE = (
    LIBRARY
    + """
if owned(ARGV[2], ARGV[3], ARGV[1]) then
  enqueue(KEYS[1], ARGV[4], ARGV[5])
  release(ARGV[2], ARGV[3])
end
"""
)

#: Give some messages back, to be handed out first. KEYS: lane. ARGV: consumer, then stream and
#: entry of each. Returns how many were ours.
GIVE_BACK = (
    LIBRARY
    + """
local count = 0
for i = 2, #ARGV, 2 do
  local stream, entry = ARGV[i], ARGV[i + 1]
  local found = redis.call('XRANGE', stream, entry, entry)
  if found[1] and owned(stream, entry, ARGV[1]) then
    enqueue(KEYS[1], 'returned', found[1][2][2])
    release(stream, entry)
    count = count + 1
  end
end
return count
"""
)

#: Give everything back, to be handed out first, and sign off. KEYS: lane. ARGV: consumer.
LEAVE = (
    LIBRARY
    + """
local lane, consumer = KEYS[1], ARGV[1]
local count = 0
for _, name in ipairs(STREAMS) do
  local stream = lane .. ':' .. name
  local reply = redis.pcall('XREADGROUP', 'GROUP', GROUP, consumer, 'STREAMS', stream, '0')
  if reply and not reply.err then
    for _, entry in ipairs(reply[1][2]) do
      if entry[2] then
        enqueue(lane, 'returned', entry[2][2])
        count = count + 1
      end
      release(stream, entry[1])
    end
    redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer)
  end
end
redis.call('HDEL', lane .. ':consumers', consumer)
return count
"""
)

#: KEYS: lane. Returns how many messages it holds.
SIZE = LIBRARY + "return backlog(KEYS[1])"

#: Delete what nobody has in hands. KEYS: lane. Returns how many messages there were.
PURGE = (
    LIBRARY
    + """
local lane = KEYS[1]
local count = redis.call('ZCARD', lane .. ':delayed')
redis.call('DEL', lane .. ':delayed')
for _, name in ipairs(STREAMS) do
  local stream = lane .. ':' .. name
  if redis.call('XLEN', stream) > 0 then
    redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0')
    local reply = redis.call('XREADGROUP', 'GROUP', GROUP, 'purge', 'STREAMS', stream, '>')
    for _, entry in ipairs(reply and reply[1][2] or {}) do
      release(stream, entry[1])
      count = count + 1
    end
    redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, 'purge')
  end
end
return count
"""
)

#: KEYS: lane.
DELETE = (
    LIBRARY
    + """
for _, name in ipairs(STREAMS) do
  redis.call('DEL', KEYS[1] .. ':' .. name)
end
for _, name in ipairs({'delayed', 'bell', 'consumers', 'paused'}) do
  redis.call('DEL', KEYS[1] .. ':' .. name)
end
"""
)
