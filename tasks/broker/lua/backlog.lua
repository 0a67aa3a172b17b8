-- Count the messages of a lane by what they wait for.
--
-- Fields: lane.
-- Returns how many wait to be fetched, how many are held, and how many are delayed.

local lane = include "tasks.transport/lane"

local total, held = 0, 0
for _, name in ipairs(lane.STREAMS) do
  local stream = args.lane .. ':' .. name
  local length = redis.call('XLEN', stream)
  if length > 0 then
    total = total + length
    local pending = redis.pcall('XPENDING', stream, lane.GROUP)
    held = held + (pending.err and 0 or pending[1])
  end
end
return {math.max(total - held, 0), held, redis.call('ZCARD', args.lane .. ':delayed')}
