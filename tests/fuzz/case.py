"""A case: the bytes that one connection sends, and what may come back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Ending(Enum):
    """What the client does after its last byte."""

    #: It waits for its answers: what it sent is complete.
    WAIT = "waits"
    #: It ends its side, so the server learns that nothing more comes.
    HALF_CLOSE = "ends its side"
    #: It resets the connection and reads nothing.
    RESET = "resets"


@dataclass(frozen=True)
class Case:
    """What one connection sends."""

    #: Name of the mutation, such as ``chunk: no size``; equal for all cases of one kind.
    kind: str
    #: Bytes that are sent one after the other.
    pieces: tuple[bytes, ...]
    #: Method of each request that may be answered; a further answer is a smuggled request's.
    methods: tuple[str, ...] = ("GET",)
    ending: Ending = Ending.HALF_CLOSE
    #: Whether the server must end the connection, because it cannot know where a request ends.
    closes: bool = False
    #: Whether no answer may be a success.
    refused: bool = False
    #: Pause between pieces, in seconds.
    gap_s: float = 0.0
    #: Whether the pieces are a WebSocket's: a handshake, then frames.
    socket: bool = False
    #: Whether the socket must still answer a ping afterwards.
    survives: bool = False
