-- Lane: give some messages back, to be handed out before all others.
--
-- Fields: lane; consumer; entries, a list of {stream, entry}.
-- Returns how many the consumer still held.

local lane = include "tasks.transport/lane"

lane.write_when_full(args.lane)
local count = 0
for _, held in ipairs(args.entries) do
  local stream, entry = held[1], held[2]
  local found = redis.call('XRANGE', stream, entry, entry)[1]
  if found and lane.owned(stream, entry, args.consumer) then
    lane.enqueue(args.lane, 'returned', found[2][2])
    lane.release(stream, entry)
    count = count + 1
  end
end
return count
