-- Lane: hand out messages again, and wake a consumer.
--
-- Fields: lane.

local lane = include "tasks.transport/lane"

redis.call('DEL', args.lane .. ':paused')
lane.ring(args.lane)
