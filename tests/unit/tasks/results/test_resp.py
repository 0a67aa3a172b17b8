"""Redis' protocol, however its bytes are cut."""

from __future__ import annotations

import pytest
import redis

from tasks.results.resp import Reply, ReplyReader, pack

STREAM = (
    b">3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n"
    b":0\r\n"
    b">3\r\n$7\r\nmessage\r\n$1\r\na\r\n$6\r\nb\r\nc\r\n\r\n"
    b"*3\r\n_\r\n$0\r\n\r\n+OK\r\n"
)
REPLIES = [0, [b"message", b"a", b"b\r\nc\r\n"], [None, b"", b"OK"]]


def reader(data, size):
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    return ReplyReader(lambda _: chunks.pop(0) if chunks else b"")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_replies_are_read_however_they_are_cut(size):
    replies = reader(STREAM, size)
    heard: list[Reply] = []
    while len(heard) < len(REPLIES) or heard[-1] != REPLIES[-1]:
        heard.append(replies.read())
    with pytest.raises(redis.ConnectionError):
        replies.read()
    assert [reply for reply in heard if reply != [b"subscribe", b"a", 1]] == REPLIES


def test_refusal_is_raised():
    with pytest.raises(redis.ResponseError, match="ERR no"):
        reader(b"-ERR no\r\n", 100).read()


def test_command_is_packed_as_redis_reads_it():
    packed = pack(b"SUBSCRIBE", [b"a", "ä".encode()])
    assert packed == b"*3\r\n$9\r\nSUBSCRIBE\r\n$1\r\na\r\n$2\r\n\xc3\xa4\r\n"
