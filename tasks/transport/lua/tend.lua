-- Lane: report that a consumer is alive, and move messages that are due into their streams.
--
-- Fields: lanes, a list; consumer; lease_ms, after which a silent consumer counts as dead.
-- Returns the time in milliseconds, and for each lane a flat list of consumers and their previous
-- reports. A report is 'TIME_MS LEASE_MS'.

local lane = include "tasks.transport/lane"

-- The maximum number of messages that one call moves, per lane.
local MAX_DUE = 1000

local now = lane.now_ms()

local function move_due(key)
  local delayed = key .. ':delayed'
  local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, MAX_DUE)
  for _, message in ipairs(due) do
    lane.enqueue(key, message:sub(1, 1), message:sub(2))
    redis.call('ZREM', delayed, message)
  end
end

local reports = {}
for i, key in ipairs(args.lanes) do
  reports[i] = redis.call('HGETALL', key .. ':consumers')
  lane.write_when_full(key)
  redis.call('HSET', key .. ':consumers', args.consumer, now .. ' ' .. args.lease_ms)
  move_due(key)
end
return {now, reports}
