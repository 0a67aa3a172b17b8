-- Lane: give back everything a consumer holds, to be handed out before all others, and remove the
-- consumer.
--
-- Fields: lane; consumer.
-- Returns how many messages were given back.

local lane = include "tasks.transport/lane"

lane.write_when_full(args.lane)
local count = 0
for _, name in ipairs(lane.STREAMS) do
  local stream = args.lane .. ':' .. name
  for _, entry in ipairs(lane.held(stream, args.consumer)) do
    if entry[2] then
      lane.enqueue(args.lane, 'returned', entry[2][2])
      count = count + 1
    end
    lane.release(stream, entry[1])
  end
  redis.pcall('XGROUP', 'DELCONSUMER', stream, lane.GROUP, args.consumer)
end
redis.call('HDEL', args.lane .. ':consumers', args.consumer)
return count
