-- Marks the tasks of a batch as running (step "forward"), just before their forward pass.
--
-- Fields:
--   index, counters         keys
--   consumer                the worker that asks
--   now                     seconds since the epoch, as text
--   batch                   id of the batch
--   alone                   whether the batch has one task, which may be a suspect
--   model, version          the version that runs
--   record_ttl_s, claim_ttl_s
--   listed                  records that the index keeps
--   riders                  a list; of each task:
--     id, record            its id, and the key of its record
--     stream, entry         its message; absent on other brokers
--     accepted_at           seconds since the epoch, as text
--     priority
--
-- Returns for each task: verdict (as `tasks.state.transitions.Verdict`), attempts, attempts that
-- ended with their worker, and the batch of the last attempt.

local lane = include "tasks.transport/lane"
local states = include "tasks.state/states"

-- Entries of tasks that are over, by stream.
local settled = {}

local function record_of(rider)
  local known = redis.call('HMGET', rider.record, 'state', 'batch_id', 'attempts', 'lost', 'claim')
  return {
    state = known[1], batch = known[2], attempts = tonumber(known[3] or 0),
    lost = tonumber(known[4] or 0), claim = known[5],
  }
end

-- Write that a task is in a forward pass.
local function start(rider, known)
  local record = rider.record
  redis.call('HSET', record, 'state', 'running', 'started_at', args.now, 'batch_id', args.batch,
             'attempts', known.attempts, 'model', args.model, 'version', args.version)
  if known.lost > 0 then
    redis.call('HSET', record, 'lost', known.lost)
  end
  if not known.state then
    -- Another client sent it.
    redis.call('HSET', record, 'accepted_at', rider.accepted_at, 'priority', rider.priority)
    redis.call('ZADD', args.index, rider.accepted_at, rider.id)
    redis.call('ZREMRANGEBYRANK', args.index, 0, -args.listed - 1)
  end
  -- Shortly after its acceptance, a record has nearly all of its lifetime left.
  if not known.state or args.now - rider.accepted_at > args.record_ttl_s / 2 then
    redis.call('EXPIRE', record, args.record_ttl_s)
  end
  if known.claim then
    redis.call('EXPIRE', known.claim, args.claim_ttl_s)
  end
end

-- Whether the rider's message is in this worker's hands, as far as the broker can tell.
local function ours(rider)
  return not rider.stream or lane.owned(rider.stream, rider.entry, args.consumer)
end

-- Begin one task; returns its verdict.
local function begin(rider, known)
  local repeated = known.state == 'running' and known.batch == args.batch
  local interrupted = known.state == 'running' and not repeated
  if interrupted then
    known.lost = known.lost + 1
  end
  if states.OVER[known.state] then
    if rider.stream and ours(rider) then
      lane.collect(settled, rider.stream, rider.entry)
    end
    return 'over'
  end
  if not ours(rider) then
    redis.call('HINCRBY', args.counters, 'stale', 1)
    return 'stale'
  end
  if interrupted and not args.alone then
    return 'suspect'
  end
  if not repeated then
    known.attempts = known.attempts + 1
    start(rider, known)
  end
  return 'done'
end

local held = {}
for _, rider in ipairs(args.riders) do
  if rider.stream then
    lane.collect(held, rider.stream, rider.entry)
  end
end
lane.look_up(held, args.consumer)
local replies = {}
for i, rider in ipairs(args.riders) do
  local known = record_of(rider)
  local verdict = begin(rider, known)
  local batch = verdict == 'done' and args.batch or known.batch or ''
  replies[i] = {verdict, known.attempts, known.lost, batch}
end
lane.release_all(settled)
return replies
