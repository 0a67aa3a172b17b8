-- Results that are kept to answer later tasks with equal inputs.
--
-- `cache` is the key prefix. `<cache>kept:<shared key>` is a result without its ending.
-- `<cache>index` is a sorted set of the shared keys by the time at which they expire, in
-- milliseconds. `<cache>sizes` is a hash of their sizes in bytes; its field '' is the sum.

local M = {}

-- Results that one step forgets beyond need, at most.
local CHUNK = 8

function M.forget(cache, keys)
  for _, key in ipairs(keys) do
    redis.call('UNLINK', cache .. 'kept:' .. key)
    redis.call('ZREM', cache .. 'index', key)
    local size = redis.call('HGET', cache .. 'sizes', key)
    if size then
      redis.call('HDEL', cache .. 'sizes', key)
      redis.call('HINCRBY', cache .. 'sizes', '', -size)
    end
  end
end

-- The kept result for a task, or false. Workers must have loaded the package that the web tier has
-- read; `packages` is the hash of the digests that they loaded.
function M.find(cache, packages, sharing)
  if redis.call('HGET', packages, sharing.package) ~= sharing.digest then
    return false
  end
  return redis.call('GET', cache .. 'kept:' .. sharing.key)
end

-- Keep a result; `limits` has `keep_ms`, and `max_entries` and `max_bytes` of all that is kept.
function M.keep(cache, key, text, now_s, limits)
  local index, sizes = cache .. 'index', cache .. 'sizes'
  if #text > limits.max_bytes then
    return
  end
  M.forget(cache, {key})
  local now_ms = now_s * 1000
  M.forget(cache, redis.call('ZRANGEBYSCORE', index, '-inf', now_ms, 'LIMIT', 0, CHUNK))
  redis.call('SET', cache .. 'kept:' .. key, text, 'PX', limits.keep_ms)
  redis.call('ZADD', index, now_ms + limits.keep_ms, key)
  redis.call('HSET', sizes, key, #text)
  redis.call('HINCRBY', sizes, '', #text)
  -- The next to expire goes first.
  for _ = 1, CHUNK do
    if redis.call('ZCARD', index) <= limits.max_entries
       and tonumber(redis.call('HGET', sizes, '')) <= limits.max_bytes then
      break
    end
    M.forget(cache, redis.call('ZRANGE', index, 0, 0))
  end
end

return M
