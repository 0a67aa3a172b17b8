-- Lane: find what a consumer already holds, for a channel that has just opened.
--
-- Fields: lane; consumer.
-- Returns {stream, entry, payload} for each message.

local lane = include "tasks.transport/lane"

local held = {}
for _, name in ipairs(lane.STREAMS) do
  local stream = args.lane .. ':' .. name
  for _, entry in ipairs(lane.held(stream, args.consumer)) do
    if entry[2] then
      held[#held + 1] = {stream, entry[1], entry[2][2]}
    else
      -- The entry was deleted while it was held.
      redis.call('XACK', stream, lane.GROUP, entry[1])
    end
  end
end
return held
