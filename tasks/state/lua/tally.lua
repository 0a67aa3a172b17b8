-- Counts for the statistics of versions, added up so that a step writes each number once.

local M = {}

-- Sums by key of the statistics, then by field.
local sums = {}

-- Run a command of a counter: one that overflows must not fail the step.
M.attempt = redis.pcall

function M.add(key, numbers)
  local fields = sums[key] or {}
  sums[key] = fields
  for field, number in pairs(numbers) do
    fields[field] = (fields[field] or 0) + number
  end
end

-- Write all sums. A step's sum is exact up to 2^53: for nanoseconds, 104 days. A stored sum ends at
-- 2^63: 292 years, or ten days in which 10,000 tasks wait all the time.
function M.write()
  for key, fields in pairs(sums) do
    for field, number in pairs(fields) do
      if number > 0 then
        M.attempt('HINCRBY', key, field, string.format('%.0f', number))
      end
    end
  end
end

return M
