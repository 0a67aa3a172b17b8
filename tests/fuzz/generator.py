"""Draws cases: the same seed and number always give the same case."""

from __future__ import annotations

from random import Random

from tests.fuzz import bodies, contents, frames, heads, streams
from tests.fuzz.case import Case
from tests.fuzz.seeds import Request

#: Share of cases that are sockets.
SOCKETS = 0.25


class Generator:
    """Draws the cases of one seed."""

    def __init__(self, seed: int, seeds: list[Request], host: bytes) -> None:
        """Prepare to draw.

        Args:
          seed: of everything random.
          seeds: valid requests.
          host: what clients name as host.
        """
        self._seed = seed
        self._seeds = seeds
        self._bodies = [request for request in seeds if request.body]
        self._host = host

    def case(self, number: int) -> Case:
        """Return the case of a number, from 0 on."""
        rng = Random(f"{self._seed}:{number}")
        if rng.random() < SOCKETS:
            return rng.choice(frames.MUTATIONS)(rng, self._host)
        family, seeds = rng.choice(
            [
                (heads.MUTATIONS, self._seeds),
                (bodies.MUTATIONS, self._bodies),
                (contents.MUTATIONS, self._bodies),
                (streams.MUTATIONS, self._seeds),
            ]
        )
        return rng.choice(family)(rng, rng.choice(seeds), self._host)
