-- Submit: put a message into a lane, now or when it is due.
--
-- Fields: lane; priority, 0 to 9; payload; due_ms, absent for a message that is due now.

local lane = include "tasks.transport/lane"

if args.due_ms and args.due_ms > lane.now_ms() then
  lane.delay(args.lane, args.due_ms, args.priority, args.payload)
else
  lane.enqueue(args.lane, args.priority, args.payload)
end
