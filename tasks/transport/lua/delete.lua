-- Delete a lane with everything in it.
--
-- Fields: lane.

local lane = include "tasks.transport/lane"

for _, name in ipairs(lane.STREAMS) do
  redis.call('DEL', args.lane .. ':' .. name)
end
for _, name in ipairs({'delayed', 'bell', 'consumers', 'paused'}) do
  redis.call('DEL', args.lane .. ':' .. name)
end
