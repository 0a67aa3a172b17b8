-- Settle: acknowledge and delete an entry, if the consumer still holds it.
--
-- Fields: stream; entry; consumer.
-- Returns 1 if the consumer held it, else 0.

local lane = include "tasks.transport/lane"

if not lane.owned(args.stream, args.entry, args.consumer) then
  return 0
end
lane.release(args.stream, args.entry)
return 1
