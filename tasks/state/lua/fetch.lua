-- Returns a task's record and result as they are at one time.
--
-- Fields: record and result, their keys.
--
-- This is a script because a full Redis refuses every transaction, even one that only reads.

return {redis.call('HGETALL', args.record), redis.call('GET', args.result)}
