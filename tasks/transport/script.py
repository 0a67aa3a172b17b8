"""Running the Lua scripts, without what redis-py does for each argument and command of its own.

A script for a batch has hundreds of arguments, and takes Redis less time than redis-py needs to
look at each of them and to record what it has done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import redis
from hiredis import pack_command

#: What an argument of a script may be.
Argument = str | bytes | int | float


class Script:
    """One Lua script, which each Redis learns when it does not know it yet."""

    def __init__(self, text: str) -> None:
        """Store the script.

        Args:
          text: Lua.
        """
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: redis.Redis, keys: Sequence[str], args: Sequence[Argument] = ()) -> Any:
        """Return what the script answers; nothing is tried again.

        Args:
          client: of a pool; its connections answer in bytes.
          keys: the script's KEYS.
          args: its ARGV.
        Raises:
          redis.RedisError: Redis does not answer, or with an error.
        """
        try:
            return _call(client, b"EVALSHA", self._sha, keys, args)
        except redis.exceptions.NoScriptError:
            return _call(client, b"EVAL", self._text, keys, args)


def _call(
    client: redis.Redis, command: bytes, script: str, keys: Sequence[str], args: Sequence[Argument]
) -> Any:
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        packed = pack_command((command, script, len(keys), *keys, *args))  # type: ignore[arg-type]
        # It connects if it must, and disconnects when it fails.
        connection.send_packed_command([packed])  # type: ignore[no-untyped-call]
        return connection.read_response()
    except redis.ResponseError:
        raise
    except BaseException:
        # An answer that was not read must not be taken for that of the next command.
        connection.disconnect()  # type: ignore[no-untyped-call]
        raise
    finally:
        pool.release(connection)
