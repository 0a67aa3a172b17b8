-- Gives wrk a different text for each request, and checks each answer.
-- Arguments, in order:
--   path of the call
--   number of the first text
--   body before the text
--   body after the text
--   text before the batch's size in an answer
--   "echoes" if answers have the text of their request
--   file of sentences
--   number of different texts
--   text in an answer that is a kept result
--   text between a sentence and its number
--   factor and modulus that make a text's number from the request's, see `texts` in workloads.py

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  path, head, tail, marker, echoes = args[1], args[3], args[4], args[5], args[6] == "echoes"
  sentences = {}
  for line in io.lines(args[7]) do
    table.insert(sentences, line)
  end
  start = "POST " .. path .. " HTTP/1.1\r\nHost: " .. wrk.headers["Host"]
    .. "\r\nContent-Type: application/json\r\nContent-Length: "
  different, kept = tonumber(args[8]), args[9]
  mark, spread, numbered = args[10], tonumber(args[11]), tonumber(args[12])
  first, sent = tonumber(args[2]), 0
  open = {}
  answered, refused, wrong, passes, sized, cached, sample = 0, 0, 0, 0, 0, 0, ""
end

function request()
  local at = first + sent % different
  sent = sent + 1
  -- Exact, because the products are less than 2^53.
  local id = string.format("%d", math.fmod(math.fmod(at * spread, numbered) * spread, numbered))
  if echoes then
    open[id] = (open[id] or 0) + 1
  end
  local body = head .. sentences[at % #sentences + 1] .. mark .. id .. tail
  return start .. #body .. "\r\n\r\n" .. body
end

function response(status, headers, body)
  if status ~= 200 then
    refused = refused + 1
    sample = sample == "" and status .. " " .. string.sub(body, 1, 200) or sample
    return
  end
  if echoes then
    local id = string.match(body, "#(%d+)")
    if id == nil or not open[id] then
      wrong = wrong + 1
      sample = sample == "" and string.sub(body, 1, 200) or sample
      return
    end
    open[id] = open[id] > 1 and open[id] - 1 or nil
  end
  answered = answered + 1
  if string.find(body, kept, 1, true) then
    cached = cached + 1
  end
  local _, stop = string.find(body, marker, 1, true)
  local size = stop and tonumber(string.match(body, "^ *(%d+)", stop + 1))
  if size then
    sized = sized + 1
    passes = passes + 1 / size
  end
end

function done(summary, latency, requests)
  local sums = { answered = 0, refused = 0, wrong = 0, sized = 0, cached = 0, passes = 0 }
  local sample = ""
  for _, thread in ipairs(threads) do
    for name, sum in pairs(sums) do
      sums[name] = sum + thread:get(name)
    end
    sample = sample == "" and thread:get("sample") or sample
  end
  local errors = summary.errors
  io.write(string.format(
    '\nresult {"answered": %d, "refused": %d, "wrong": %d, "sized": %d, "cached": %d, "passes": %.6f, "seconds": %.6f, '
      .. '"connect": %d, "read": %d, "write": %d, "timeout": %d, '
      .. '"p50": %.3f, "p90": %.3f, "p95": %.3f, "p99": %.3f, "max": %.3f}\n',
    sums.answered, sums.refused, sums.wrong, sums.sized, sums.cached, sums.passes, summary.duration / 1e6,
    errors.connect, errors.read, errors.write, errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(95) / 1e3,
    latency:percentile(99) / 1e3, latency.max / 1e3))
  io.write("sample ", (string.gsub(sample, "%s+", " ")), "\n")
end
