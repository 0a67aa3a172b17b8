"""Lua scripts: loading them from files, and running them with named arguments.

A script `name` of a package is its file `lua/name.lua`. It gets one argument, a table of named
fields. It may include modules, files of the same kind that end in `return`::

    local lane = include "tasks.transport/lane"
    lane.ring(args.lane)

Long payloads travel beside the table, and its fields hold their numbers: `payload(task.message)`.
Lua hashes each byte of a string, so it would take twice as long for what is inside.

Each script runs in Redis as one atomic step.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import msgpack
import redis
from hiredis import pack_command

#: `include "package/name"`, the only way in which one file refers to another.
_INCLUDE = re.compile(r'\binclude "([\w.]+)/(\w+)"')


class Script:
    """One Lua script, which each Redis server learns when it does not know it yet."""

    def __init__(self, package: str, name: str) -> None:
        """Load the script with everything that it includes.

        Args:
          package: dotted name of the package that owns it.
          name: name of its file, without folder and ending.
        """
        self._text = source(package, name)
        self._sha = hashlib.sha1(self._text.encode(), usedforsecurity=False).hexdigest()

    def run(
        self, client: redis.Redis, arguments: Mapping[str, Any], payloads: Sequence[bytes] = ()
    ) -> Any:
        """Run the script once and return its answer; nothing is tried again.

        Args:
          client: its connections must answer in bytes.
          arguments: fields of the script's `args`. Lua keeps 14 digits of a number that it writes
            as text, so times that are stored travel as text.
          payloads: what `payload` returns for 1, 2 and so on.
        Raises:
          redis.RedisError: Redis does not answer, or answers with an error.
        """
        # Redis' decoder knows only the older form, in which text and bytes are one type.
        packed = msgpack.packb(arguments, use_bin_type=False)
        try:
            return _call(client, b"EVALSHA", self._sha, packed, payloads)
        except redis.exceptions.NoScriptError:
            return _call(client, b"EVAL", self._text, packed, payloads)


@cache
def source(package: str, name: str) -> str:
    """Return the text of a script, with the modules that it includes before it.

    Raises:
      FileNotFoundError: the script or an included module does not exist.
    """
    modules: dict[str, str] = {}
    text = _read(package, name)
    _collect(text, modules)
    parts = ["local args = cmsgpack.unpack(ARGV[1])", "local modules = {}"]
    parts.append("local function payload(number) return ARGV[number + 1] end")
    parts.append("local function include(name) return modules[name] end")
    parts += [f'modules["{key}"] = (function()\n{module}end)()' for key, module in modules.items()]
    return "\n".join([*parts, text])


def _collect(text: str, modules: dict[str, str]) -> None:
    """Add the modules that a text includes, each after those that it includes itself."""
    for package, name in _INCLUDE.findall(text):
        key = f"{package}/{name}"
        if key not in modules:
            module = _read(package, name)
            _collect(module, modules)
            modules[key] = module


def _read(package: str, name: str) -> str:
    return (files(package) / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def _call(
    client: redis.Redis, command: bytes, script: str, packed: bytes, payloads: Sequence[bytes]
) -> Any:
    # redis-py looks at each argument and records each command, which takes longer than the script.
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        # It connects if it must, and disconnects when it fails.
        connection.send_packed_command(  # type: ignore[no-untyped-call]
            [pack_command((command, script, 0, packed, *payloads))]  # type: ignore[arg-type]
        )
        return connection.read_response()
    except redis.ResponseError:
        raise
    except BaseException:
        # An answer that was not read must not be taken for the next command's.
        connection.disconnect()  # type: ignore[no-untyped-call]
        raise
    finally:
        pool.release(connection)
