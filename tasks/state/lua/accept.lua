-- Accepts tasks (step "submit"): record, idempotency key and message appear together.
--
-- Fields:
--   index, deployments, packages   keys
--   cache                          key prefix of what tasks share
--   generation_field               field of `deployments` that holds the generation
--   record_ttl_s, idempotency_ttl_s, claim_ttl_s, result_ttl_s
--   listed                         records that the index keeps
--   max_followers                  of one leader
--   date                           the time as results tell it
--   tasks                          a list; of each task:
--     id, record                   its id, and the key of its record
--     accepted_at                  seconds since the epoch, as text
--     facts                        names and values of its record in turn
--     priority
--     lane, message (a payload)    absent where the caller publishes the message itself
--     most_ahead                   refuse it when more tasks are ahead of it
--     generation                   refuse it when this is another one, as text
--     idempotency                  key, and value: fingerprint and task id
--     claim                        key, and inputs (a payload) or source: the key that they are
--                                  copied from
--     sharing                      key, package, digest, statistics, result (keys, but for the
--                                  digest); results, coalesce (whether a kept result or that of a
--                                  leader will do); webhook (lane and message)
--
-- Returns for each task an answer and a value: accepted; over, its outcome; made, what is stored
-- under the idempotency key; overloaded, the number of tasks ahead; outdated; gone.

local lane = include "tasks.transport/lane"
local kept_results = include "tasks.state/kept_results"
local sharing = include "tasks.state/sharing"

local generation = redis.call('HGET', args.deployments, args.generation_field) or '0'
-- Scores and members for the index.
local newest = {}
-- Lanes that have got a message.
local lanes = {}
-- Lengths of the streams of a lane, by lane and priority: Redis is asked once for all tasks.
local lengths = {}

-- The answer to a task that is known, or cannot be accepted; nil otherwise.
local function settled_before(task)
  local key, claim = task.idempotency, task.claim
  local earlier = key and redis.call('GET', key.key)
  if earlier and earlier ~= key.value then
    return {'made', earlier}
  end
  if redis.call('EXISTS', task.record) == 1 then
    -- Repeated after its answer was lost. If the task is over, nobody announces it again.
    local outcome = task.sharing and redis.call('GET', task.sharing.result)
    return outcome and {'over', outcome} or {'accepted', ''}
  end
  if task.generation and task.generation ~= generation then
    return {'outdated', ''}
  end
  if claim and claim.source and redis.call('EXISTS', claim.source) == 0 then
    return {'gone', ''}
  end
end

local function lengths_of(key)
  local known = lengths[key]
  if not known then
    known = {}
    for _, name in ipairs(lane.STREAMS) do
      known[name] = redis.call('XLEN', key .. ':' .. name)
    end
    lengths[key] = known
  end
  return known
end

-- The number of tasks in the streams that are served before a task, or together with it.
local function ahead(task)
  local known, count = lengths_of(task.lane), 0
  for _, name in ipairs(lane.STREAMS) do
    count = count + known[name]
    if name == task.priority then
      break
    end
  end
  return count
end

-- Settle a task with a kept result; returns its outcome.
local function answer(task, text)
  local by = task.sharing
  local outcome = sharing.outcome(text, task.id, '0.0', ',"cached":true', args.date)
  redis.call('SET', by.result, outcome, 'EX', args.result_ttl_s)
  redis.call('HSET', task.record, unpack(task.facts))
  redis.call('HSET', task.record, 'state', 'succeeded', 'finished_at', task.accepted_at,
             'cached', 1)
  redis.call('PUBLISH', by.result, outcome)
  if by.webhook then
    lane.append(by.webhook.lane, 0, by.webhook.message)
    lanes[by.webhook.lane] = true
  end
  redis.call('HINCRBY', by.statistics, 'hit_count', 1)
  return outcome
end

-- Publish a task's message, behind its leader or in its lane, and write its record.
local function publish(task, leader)
  local by = task.sharing
  local stream, entry
  if leader then
    stream, entry = sharing.follow(args.cache, leader, task, args.record_ttl_s)
    redis.call('HINCRBY', by.statistics, 'coalesced_count', 1)
  else
    stream, entry = lane.append(task.lane, task.priority, payload(task.message))
    lanes[task.lane] = true
    local known = lengths[task.lane]
    if known then
      known[task.priority] = known[task.priority] + 1
    end
    if by and by.coalesce then
      sharing.lead(args.cache, task, args.record_ttl_s)
    end
    if by and by.results then
      redis.call('HINCRBY', by.statistics, 'miss_count', 1)
    end
  end
  redis.call('HSET', task.record, 'stream', stream, 'entry', entry, unpack(task.facts))
end

-- Let a task that was accepted be found: in the index, and by its idempotency key.
local function remember(task)
  redis.call('EXPIRE', task.record, args.record_ttl_s)
  newest[#newest + 1] = task.accepted_at
  newest[#newest + 1] = task.id
  local key = task.idempotency
  if key then
    redis.call('SET', key.key, key.value, 'EX', args.idempotency_ttl_s)
  end
end

local function keep_inputs(record, claim)
  if claim.source then
    redis.call('COPY', claim.source, claim.key)
    redis.call('EXPIRE', claim.key, args.claim_ttl_s)
  else
    redis.call('SET', claim.key, payload(claim.inputs), 'EX', args.claim_ttl_s)
  end
  redis.call('HSET', record, 'claim', claim.key)
  -- The record outlives the inputs, because it says what to delete.
  redis.call('EXPIRE', record, math.max(args.record_ttl_s, args.claim_ttl_s))
end

-- Accept one task; returns its answer.
local function accept(task)
  local by = task.sharing
  local known = settled_before(task)
  if known then
    return known
  end
  local text = by and by.results and kept_results.find(args.cache, args.packages, by)
  if text then
    local outcome = answer(task, text)
    remember(task)
    return {'over', outcome}
  end
  local leader = by and by.coalesce
                 and sharing.leader(args.cache, by.key, task.priority, args.max_followers)
  if task.most_ahead and task.lane and not leader then
    local count = ahead(task)
    if count > task.most_ahead then
      return {'overloaded', tostring(count)}
    end
  end
  if task.lane then
    publish(task, leader)
  else
    redis.call('HSET', task.record, unpack(task.facts))
  end
  remember(task)
  if task.claim then
    keep_inputs(task.record, task.claim)
  end
  return {'accepted', ''}
end

local answers = {}
for i, task in ipairs(args.tasks) do
  answers[i] = accept(task)
end
if #newest > 0 then
  redis.call('ZADD', args.index, unpack(newest))
  redis.call('ZREMRANGEBYRANK', args.index, 0, -args.listed - 1)
end
for used in pairs(lanes) do
  lane.ring(used)
end
return answers
