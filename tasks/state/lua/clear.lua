-- Forgets kept results.
--
-- Fields: cache, the key prefix; beginning, what their shared keys begin with.
-- Returns how many were forgotten.

local kept_results = include "tasks.state/kept_results"

local chosen = {}
for _, key in ipairs(redis.call('ZRANGE', args.cache .. 'index', 0, -1)) do
  if key:sub(1, #args.beginning) == args.beginning then
    chosen[#chosen + 1] = key
  end
end
kept_results.forget(args.cache, chosen)
return #chosen
