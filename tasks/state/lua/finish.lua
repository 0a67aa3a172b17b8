-- Does what is to happen to tasks, and settles their messages (step "settle").
--
-- Fields:
--   counters                key
--   consumer                the worker that settles; absent when anyone may
--   result_ttl_s, record_ttl_s
--   afterwards              Redis commands that follow if anything happened to any task; one that
--                           fails changes nothing else
--   steps                   a list; of each task:
--     record                key of its record
--     stream, entry         its message; absent on other brokers
--     commands              a list, of Redis commands and of tables with a `kind`; their fields
--                           outcome, message and text are payloads:
--
--   end        result (key), outcome, state, finished_at (seconds since the epoch, as text); and
--              if needed keep_inputs_s (how long claimed inputs are kept), and facts (names and
--              values in turn, for a task without a record)
--   enqueue    lane, priority, message
--   delay      lane, priority, message, due_ms
--   share      cache, key, text, now (seconds since the epoch, as text), date (the same, as results
--              tell it), statistics (key), keep (absent, or keep_ms, max_entries, max_bytes)
--   disband    cache, key
--   count      statistics (key), numbers (by field)
--
-- Returns for each task a verdict, as `tasks.state.transitions.Verdict`.

local lane = include "tasks.transport/lane"
local states = include "tasks.state/states"
local sharing = include "tasks.state/sharing"
local tally = include "tasks.state/tally"

-- Outcomes for each process that clients wait in, by its channel.
local replies = {}
-- Entries of messages that are settled, by stream.
local settled = {}

-- Store an outcome, announce it to those who listen to this task, and collect it for the process
-- that its client waits in.
local function announce(result, outcome, reply_to)
  redis.call('SET', result, outcome, 'EX', args.result_ttl_s)
  redis.call('PUBLISH', result, outcome)
  if reply_to then
    replies[reply_to] = replies[reply_to] or {}
    table.insert(replies[reply_to], outcome)
  end
end

-- What each kind of command does; `known` is what the task's record said before.
local run = {}

run['end'] = function(command, record, known)
  announce(command.result, payload(command.outcome), known.reply_to)
  redis.call('HSET', record, 'state', command.state, 'finished_at', command.finished_at)
  if not known.state then
    local facts = command.facts or {}
    for i = 1, #facts, 2 do
      redis.call('HSETNX', record, facts[i], facts[i + 1])
    end
  end
  redis.call('EXPIRE', record, args.record_ttl_s)
  if known.claim and command.keep_inputs_s then
    redis.call('EXPIRE', known.claim, command.keep_inputs_s)
  elseif known.claim then
    redis.call('UNLINK', known.claim)
  end
end

function run.enqueue(command)
  lane.enqueue(command.lane, command.priority, payload(command.message))
end

function run.delay(command)
  lane.delay(command.lane, command.due_ms, command.priority, payload(command.message))
end

function run.share(command, record)
  sharing.share(command, record, args.record_ttl_s, announce)
end

function run.disband(command, record)
  sharing.disband(command, record)
end

function run.count(command)
  tally.add(command.statistics, command.numbers)
end

-- Do what is to happen to one task; returns its verdict.
local function finish(step)
  local values = redis.call('HMGET', step.record, 'state', 'reply_to', 'claim')
  local known = {state = values[1], reply_to = values[2], claim = values[3]}
  local ours = not step.stream or not args.consumer
               or lane.owned(step.stream, step.entry, args.consumer)
  -- Cancelling a task takes its message away, too.
  if not ours and known.state ~= 'cancelled' then
    redis.call('HINCRBY', args.counters, 'stale', 1)
  end
  local verdict = states.OVER[known.state] and 'over' or not ours and 'stale' or 'done'
  if verdict == 'done' then
    for _, command in ipairs(step.commands) do
      if command.kind then
        run[command.kind](command, step.record, known)
      else
        redis.call(unpack(command))
      end
    end
  end
  if ours and step.stream then
    lane.collect(settled, step.stream, step.entry)
  end
  return verdict
end

if not args.consumer then
  -- It ends waiting tasks early, which frees their messages. The results of workers may be large.
  lane.write_when_full(args.steps[1].record)
else
  local held = {}
  for _, step in ipairs(args.steps) do
    if step.stream then
      lane.collect(held, step.stream, step.entry)
    end
  end
  lane.look_up(held, args.consumer)
end
local verdicts, happened = {}, false
for i, step in ipairs(args.steps) do
  verdicts[i] = finish(step)
  happened = happened or verdicts[i] == 'done'
end
lane.release_all(settled)
if happened then
  tally.write()
  for _, command in ipairs(args.afterwards) do
    tally.attempt(unpack(command))
  end
end
-- One message to each process, however many of its tasks were in the batch: an array of outcomes.
for reply_to, outcomes in pairs(replies) do
  redis.call('PUBLISH', reply_to, '[' .. table.concat(outcomes, ',') .. ']')
end
return verdicts
