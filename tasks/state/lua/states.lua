-- The states in which a task is over: `inferno.protocol.tasks.TERMINAL`.

local M = {}

M.OVER = {cancelled = true, expired = true, failed = true, succeeded = true}

return M
