-- The keys of a lane, and the steps from which scripts on lanes are built.
--
-- `lane` is the key prefix of one queue. `<lane>:0` to `:9` and `<lane>:returned` are streams,
-- `:delayed` is a sorted set, `:bell` a list, `:consumers` a hash, `:paused` a string.
-- `entry` is an id within `stream`. Times are Redis' own, in milliseconds.
-- These scripts compute the names of keys, so they do not run on Redis Cluster.

local M = {}

-- The consumer group of every stream.
M.GROUP = 'workers'
-- The streams of a lane, in the order in which they are handed out.
M.STREAMS = {'returned', '9', '8', '7', '6', '5', '4', '3', '2', '1', '0'}

local GROUP = M.GROUP

function M.now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Let a script write although Redis is full. Only for steps that free memory or take a few bytes.
-- Redis refuses no write of a script that has written before, so this first deletes a key that
-- does not exist; `prefix` is that of a key of the script.
function M.write_when_full(prefix)
  redis.call('DEL', prefix .. ':none')
end

-- Wake one waiting consumer. The bell has one element at most; the consumer that takes it fetches.
function M.ring(lane)
  if redis.call('EXISTS', lane .. ':bell') == 0 then
    redis.call('LPUSH', lane .. ':bell', 1)
  end
end

-- Append a message and wake nobody; returns the stream's key and the entry's id.
function M.append(lane, priority, payload)
  local stream = lane .. ':' .. priority
  return stream, redis.call('XADD', stream, '*', 'message', payload)
end

-- Append a message, and wake a consumer.
function M.enqueue(lane, priority, payload)
  M.append(lane, priority, payload)
  M.ring(lane)
end

-- Keep a message until `due_ms`; `tend` then puts it into its stream.
function M.delay(lane, due_ms, priority, payload)
  redis.call('ZADD', lane .. ':delayed', due_ms, priority .. payload)
end

-- Acknowledge and delete an entry, no matter which consumer holds it.
function M.release(stream, entry)
  redis.pcall('XACK', stream, GROUP, entry)
  redis.call('XDEL', stream, entry)
end

-- Return the entries of a stream that a consumer holds, as {id, fields}. A deleted entry has no
-- fields.
function M.held(stream, consumer)
  local reply = redis.pcall('XREADGROUP', 'GROUP', GROUP, consumer, 'STREAMS', stream, '0')
  -- An error means that the stream or its group does not exist.
  return reply and not reply.err and reply[1][2] or {}
end

-- Return the number of messages that wait, are delayed, or are held.
function M.backlog(lane)
  local count = redis.call('ZCARD', lane .. ':delayed')
  for _, name in ipairs(M.STREAMS) do
    count = count + redis.call('XLEN', lane .. ':' .. name)
  end
  return count
end

-- Entries that `look_up` has found to be held by the asking consumer, by stream.
local found = {}

-- Return whether a consumer holds an entry.
function M.owned(stream, entry, consumer)
  if found[stream] and found[stream][entry] then
    return true
  end
  local pending = redis.pcall('XPENDING', stream, GROUP, entry, entry, 1, consumer)
  return not pending.err and #pending > 0
end

-- Look up many entries at once, so that `owned` need not ask Redis for each.
--
-- `held` maps each stream to its entries. The entries of a batch stand together in their stream, so
-- this asks for a few more than their number, from the first one on. Ids do not always sort as text
-- does; `owned` asks by itself for an entry that this does not find.
function M.look_up(held, consumer)
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

-- Add an entry to a table of entries by stream, as `look_up` and `release_all` take it.
function M.collect(by_stream, stream, entry)
  local entries = by_stream[stream] or {}
  by_stream[stream] = entries
  entries[#entries + 1] = entry
end

-- `unpack` returns at most about 8,000 values.
local MOST_AT_ONCE = 1000

-- Acknowledge and delete entries, many of a stream with each command.
function M.release_all(by_stream)
  for stream, entries in pairs(by_stream) do
    for first = 1, #entries, MOST_AT_ONCE do
      local last = math.min(first + MOST_AT_ONCE - 1, #entries)
      redis.pcall('XACK', stream, GROUP, unpack(entries, first, last))
      redis.call('XDEL', stream, unpack(entries, first, last))
    end
  end
end

return M
