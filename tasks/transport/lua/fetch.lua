-- Lane: hand waiting messages to a consumer, the most urgent first.
--
-- Fields: lane; consumer; lease_ms, after which a silent consumer counts as dead; limit, the
-- maximum number of messages.
-- Returns {stream, entry, payload} for each message.

local lane = include "tasks.transport/lane"

local left = args.limit

local function read(stream)
  local reply = redis.pcall('XREADGROUP', 'GROUP', lane.GROUP, args.consumer, 'COUNT', left,
                            'STREAMS', stream, '>')
  if reply and reply.err then
    -- The stream is new, or was deleted together with its group.
    redis.call('XGROUP', 'CREATE', stream, lane.GROUP, '0', 'MKSTREAM')
    return read(stream)
  end
  return reply and reply[1][2] or {}
end

-- A consumer must be on record before it holds its first message: only then can others find it
-- dead. HSETNX would not do: a full Redis refuses it even when it changes nothing.
local consumers = args.lane .. ':consumers'
if redis.call('HEXISTS', consumers, args.consumer) == 0 then
  redis.call('HSET', consumers, args.consumer, lane.now_ms() .. ' ' .. args.lease_ms)
end

local fetched = {}
if redis.call('EXISTS', args.lane .. ':paused') == 1 then
  return fetched
end
for _, name in ipairs(lane.STREAMS) do
  local stream = args.lane .. ':' .. name
  if left > 0 and redis.call('XLEN', stream) > 0 then
    for _, entry in ipairs(read(stream)) do
      fetched[#fetched + 1] = {stream, entry[1], entry[2][2]}
      left = left - 1
    end
  end
end
if left <= 0 then
  -- More may wait: wake another consumer.
  lane.ring(args.lane)
end
return fetched
