-- Writes a worker's report, also while Redis is full: without it the worker counts as dead.
--
-- Fields:
--   workers, packages   keys
--   worker, report      the worker's name, and its report
--   gone                names of the workers whose reports are removed
--   digests             names and digests of the packages that it has loaded, in turn

local lane = include "tasks.transport/lane"

lane.write_when_full(args.workers)
if #args.gone > 0 then
  redis.call('HDEL', args.workers, unpack(args.gone))
end
redis.call('HSET', args.workers, args.worker, args.report)
if #args.digests > 0 then
  redis.call('HSET', args.packages, unpack(args.digests))
end
