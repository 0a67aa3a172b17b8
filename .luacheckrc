-- Redis runs Lua 5.1. Scripts see what Redis offers, and what `tasks/transport/script.py` adds.
std = "lua51"
read_globals = { "redis", "cmsgpack", "args", "include", "payload" }
max_line_length = 100
