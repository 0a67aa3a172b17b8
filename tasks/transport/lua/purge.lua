-- Delete the messages that no consumer holds.
--
-- Fields: lane.
-- Returns how many there were.

local lane = include "tasks.transport/lane"

-- Fetching all new entries as a consumer of its own tells them from those that are held.
local CONSUMER = 'purge'

local function purge(stream)
  redis.pcall('XGROUP', 'CREATE', stream, lane.GROUP, '0')
  local reply = redis.call('XREADGROUP', 'GROUP', lane.GROUP, CONSUMER, 'STREAMS', stream, '>')
  local entries = reply and reply[1][2] or {}
  for _, entry in ipairs(entries) do
    lane.release(stream, entry[1])
  end
  redis.call('XGROUP', 'DELCONSUMER', stream, lane.GROUP, CONSUMER)
  return #entries
end

local count = redis.call('ZCARD', args.lane .. ':delayed')
redis.call('DEL', args.lane .. ':delayed')
for _, name in ipairs(lane.STREAMS) do
  local stream = args.lane .. ':' .. name
  if redis.call('XLEN', stream) > 0 then
    count = count + purge(stream)
  end
end
return count
