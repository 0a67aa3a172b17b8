"""The states of a task, which stand once in Python and once in Lua."""

from __future__ import annotations

import re

from inferno.protocol.tasks import TERMINAL
from tasks.transport.script import source


def test_lua_and_python_agree_on_the_terminal_states():
    (table,) = re.findall(r"M\.OVER = {(.*?)}", source("tasks.state", "states"), re.DOTALL)
    assert set(re.findall(r"(\w+) = true", table)) == set(TERMINAL)
