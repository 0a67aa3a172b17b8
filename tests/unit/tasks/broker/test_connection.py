"""How the errors of Redis are translated."""

from __future__ import annotations

import pytest
import redis

from inferno.errors import BrokerUnavailable
from tasks.broker.connection import translated


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("Connection refused"),
        redis.TimeoutError("Timeout reading from socket"),
        redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        redis.ReadOnlyError("You can't write against a read only replica."),
        redis.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"),
        redis.ResponseError("NOREPLICAS Not enough good replicas to write."),
        # Redis 6.2, from inside a script.
        redis.ResponseError(
            "Error running script (call to f_2f1c): @user_script:9: @user_script: 9: "
            "-OOM command not allowed when used memory > 'maxmemory'."
        ),
    ],
)
def test_redis_that_takes_nothing_is_unavailable(error):
    with pytest.raises(BrokerUnavailable), translated():
        raise error


@pytest.mark.parametrize(
    "text",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "BUSYGROUP Consumer Group name already exists",
    ],
)
def test_other_errors_are_not_translated(text):
    with pytest.raises(redis.ResponseError, match=text), translated():
        raise redis.ResponseError(text)
