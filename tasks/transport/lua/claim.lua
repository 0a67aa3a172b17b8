-- Lane: take over what a dead consumer held.
--
-- Fields: lane; dead, the consumer that died; report, its last one at the time it was found dead;
-- consumer, which takes over; limit, the maximum number of messages.
-- Returns {stream, entry, payload} for each message.

local lane = include "tasks.transport/lane"

local left = args.limit
local claimed = {}

local function pending(stream, count)
  return redis.pcall('XPENDING', stream, lane.GROUP, '-', '+', count, args.dead)
end

local function claim(stream)
  for _, item in ipairs(left > 0 and pending(stream, left) or {}) do
    local entry = redis.call('XCLAIM', stream, lane.GROUP, args.consumer, 0, item[1])[1]
    if entry and entry[2] then
      claimed[#claimed + 1] = {stream, entry[1], entry[2][2]}
      left = left - 1
    else
      -- The entry was deleted while it was held.
      redis.call('XACK', stream, lane.GROUP, item[1])
    end
  end
end

-- Remove the dead consumer from a stream where it holds nothing; returns whether it holds nothing.
-- Removing a consumer discards what it still holds.
local function remove(stream)
  if #pending(stream, 1) > 0 then
    return false
  end
  redis.pcall('XGROUP', 'DELCONSUMER', stream, lane.GROUP, args.dead)
  return true
end

if redis.call('HGET', args.lane .. ':consumers', args.dead) ~= args.report then
  -- It is back, or another consumer has taken over.
  return claimed
end
local removed = true
for _, name in ipairs(lane.STREAMS) do
  local stream = args.lane .. ':' .. name
  claim(stream)
  removed = remove(stream) and removed
end
if removed then
  redis.call('HDEL', args.lane .. ':consumers', args.dead)
end
return claimed
