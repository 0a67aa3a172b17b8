-- Leaders and followers: tasks with equal inputs that share one computation.
--
-- `cache` is the key prefix. `<cache>leader:<shared key>` is the key of the leader's record.
-- `<cache>followers:<shared key>` is a stream with one entry for each follower: its message, and
-- how to settle it.

local lane = include "tasks.transport/lane"
local states = include "tasks.state/states"
local kept_results = include "tasks.state/kept_results"
local tally = include "tasks.state/tally"

local M = {}

-- Another task's result as the outcome of task `id`, in Celery's format. `text` is that result
-- without its ending, which starts with the milliseconds that the task has waited.
function M.outcome(text, id, waited_ms, ending, date)
  return '{"task_id":"' .. id .. '","status":"SUCCESS","result":' .. text .. waited_ms
         .. ',"total_ms":' .. waited_ms .. '}' .. ending
         .. '},"traceback":null,"children":[],"date_done":"' .. date .. '"}'
end

-- The record of the leader that a new task may follow, or false. A task does not follow one of
-- lower priority: it would wait longer than in its lane.
function M.leader(cache, key, priority, max_followers)
  local record = redis.call('GET', cache .. 'leader:' .. key)
  if not record or redis.call('XLEN', cache .. 'followers:' .. key) >= max_followers then
    return false
  end
  local known = redis.call('HMGET', record, 'state', 'priority', 'stream', 'entry')
  local state, stream, entry = known[1], known[3], known[4]
  if not stream or states.OVER[state] or tonumber(known[2]) < tonumber(priority) then
    return false
  end
  -- The leader's message may have been purged, or moved to be tried again.
  return #redis.call('XRANGE', stream, entry, entry) > 0 and record
end

-- Let a new task wait for its leader; returns the stream and entry of its message.
function M.follow(cache, leader, task, record_ttl_s)
  local sharing = task.sharing
  local stream = cache .. 'followers:' .. sharing.key
  local webhook = sharing.webhook or {lane = '', message = ''}
  -- First, because a full Redis refuses this.
  local entry = redis.call('XADD', stream, '*', 'message', payload(task.message),
                           'record', task.record, 'task_id', task.id, 'result', sharing.result,
                           'accepted_at', task.accepted_at, 'lane', task.lane,
                           'priority', task.priority,
                           'webhook_lane', webhook.lane, 'webhook', webhook.message)
  -- A leader must not be forgotten before its followers.
  redis.call('EXPIRE', leader, record_ttl_s)
  redis.call('EXPIRE', cache .. 'leader:' .. sharing.key, record_ttl_s)
  return stream, entry
end

-- Make a new task the leader of those that come after it.
function M.lead(cache, task, record_ttl_s)
  redis.call('SET', cache .. 'leader:' .. task.sharing.key, task.record, 'EX', record_ttl_s)
end

-- Call `visit(follower, known)` for each follower that is not over, and delete them all. `visit`
-- returns the lane to which it has appended a message, if any.
local function each_follower(cache, key, visit)
  local stream = cache .. 'followers:' .. key
  local lanes = {}
  for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+')) do
    local follower, fields = {}, entry[2]
    for i = 1, #fields, 2 do
      follower[fields[i]] = fields[i + 1]
    end
    local known = redis.call('HMGET', follower.record, 'state', 'reply_to', 'claim')
    if not (known[1] and states.OVER[known[1]]) then
      local used = visit(follower, {state = known[1], reply_to = known[2], claim = known[3]})
      if used then
        lanes[used] = true
      end
    end
  end
  redis.call('DEL', stream)
  for used in pairs(lanes) do
    lane.ring(used)
  end
end

-- Update the record of a follower that has its leader's result.
local function record_success(record, now, batch, record_ttl_s)
  redis.call('HSET', record, 'state', 'succeeded', 'finished_at', now)
  if batch then
    redis.call('HSET', record, 'batch_id', batch)
  end
  redis.call('EXPIRE', record, record_ttl_s)
end

-- Keep a leader's result, and settle its followers with it. `command` is what `finish.lua` calls
-- `share`; `announce` stores and announces an outcome.
function M.share(command, record, record_ttl_s, announce)
  local cache, key, now = command.cache, command.key, command.now
  local text = payload(command.text)
  if command.keep then
    kept_results.keep(cache, key, text, now, command.keep)
  end
  redis.call('DEL', cache .. 'leader:' .. key)
  local batch = redis.call('HGET', record, 'batch_id')
  local followers, all_waited_s = 0, 0
  each_follower(cache, key, function(follower, known)
    local waited_s = math.max(now - follower.accepted_at, 0)
    local waited_ms = string.format('%.3f', waited_s * 1000)
    followers, all_waited_s = followers + 1, all_waited_s + waited_s
    local outcome = M.outcome(text, follower.task_id, waited_ms, '', command.date)
    announce(follower.result, outcome, known.reply_to)
    if known.state then
      record_success(follower.record, now, batch, record_ttl_s)
    end
    if known.claim then
      redis.call('UNLINK', known.claim)
    end
    if follower.webhook ~= '' then
      lane.append(follower.webhook_lane, 0, follower.webhook)
      return follower.webhook_lane
    end
  end)
  tally.add(command.statistics, {shared_count = followers, shared_ns = all_waited_s * 1e9})
end

-- Put the followers of a task into their lane, unless they follow another leader by now.
function M.disband(command, record)
  local cache, key = command.cache, command.key
  local leader = redis.call('GET', cache .. 'leader:' .. key)
  if leader and leader ~= record then
    return
  end
  redis.call('DEL', cache .. 'leader:' .. key)
  each_follower(cache, key, function(follower, known)
    local stream, entry = lane.append(follower.lane, follower.priority, follower.message)
    if known.state then
      redis.call('HSET', follower.record, 'stream', stream, 'entry', entry)
    end
    return follower.lane
  end)
end

return M
