-- Settle: put a message at the end of its stream again, if the consumer still holds it.
--
-- Fields: lane; stream; entry; consumer; priority, 0 to 9; payload.

local lane = include "tasks.transport/lane"

if lane.owned(args.stream, args.entry, args.consumer) then
  lane.write_when_full(args.lane)
  lane.enqueue(args.lane, args.priority, args.payload)
  lane.release(args.stream, args.entry)
end
