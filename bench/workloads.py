"""The workloads, and the texts that requests carry."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Workload:
    """Work that every target offers."""

    name: str
    #: Inferno's model for it, and the version.
    model: str
    version: int
    #: Whether the text comes back, so that each answer can be matched with its request.
    echoes: bool
    description: str


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("echo", "echo", 1, True, "returns the text; the cost of a call by itself"),
        Workload("simulated", "mock", 1, True, "5 ms and 0.05 ms a row, one executor; batching"),
        Workload("embed", "embed", 2, False, "sentence embeddings by MiniLM, fp32"),
        Workload("embed-int8", "embed", 1, False, "sentence embeddings by MiniLM, int8"),
    )
}

_WORDS = """
    the a one every this old young small quiet bright slow sudden green river city mountain train
    doctor teacher garden letter window harbour market winter morning evening story engine paper
    walks writes carries remembers opens finds follows repairs paints counts answers leaves near
    under behind beside without after before over through because while and but often never gladly
"""
#: Words in a text, without its number.
_SHORTEST, _LONGEST = 4, 14
#: Separates the sentence from the number that makes a text unique.
MARK = " #"
#: Number of different texts, a prime.
NUMBERED = 99_999_999_977
#: Factor that is applied twice, modulo `NUMBERED`, so that each range has numbers of all kinds: a
#: tokenizer makes 16.6 pieces of a text whose number follows 10^9, and 17.6 after 31 * 10^9.
SPREAD = 69_069


def sentences(number: int = 2048, seed: int = 0) -> list[str]:
    """Return short sentences of varied length; equal seeds give equal sentences."""
    chance, words = random.Random(seed), _WORDS.split()
    return [
        " ".join(chance.choices(words, k=chance.randint(_SHORTEST, _LONGEST)))
        for _ in range(number)
    ]


class Numbers:
    """Hands out each range of numbers once, so that no text is sent twice in a run."""

    #: Size of a range: more than the requests of one measurement.
    RANGE = 10**7

    def __init__(self) -> None:
        """Begin at the first range."""
        self._ranges = count(1)

    def first(self) -> int:
        """Return the first number of the next range."""
        return next(self._ranges) * self.RANGE


def texts(first: int) -> Iterator[str]:
    """Yield different texts, numbered from `first`; `wrk.lua` makes the same ones."""
    known = sentences()
    for number in count(first):
        yield f"{known[number % len(known)]}{MARK}{number * SPREAD**2 % NUMBERED}"
