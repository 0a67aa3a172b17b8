-- Lane: stop handing out messages.
--
-- Fields: lane.

local lane = include "tasks.transport/lane"

lane.write_when_full(args.lane)
redis.call('SET', args.lane .. ':paused', 1)
