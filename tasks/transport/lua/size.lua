-- Count the messages of a lane: waiting, delayed and held.
--
-- Fields: lane.
-- Returns the number.

local lane = include "tasks.transport/lane"

return lane.backlog(args.lane)
