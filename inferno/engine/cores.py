"""The cores of this machine: how busy they are, and those that are kept for forward passes.

With `INFERNO_INFERENCE__CORES`:

    inferno up    leaves them; so do all processes that it starts
    worker        leaves them, and each of its threads takes them for a forward pass
    loading       takes them, so that a runtime's own threads are on them

A pass that shares its core is interrupted some 200 times in a second, also while another core is
idle (`perf sched`, `embed` with 64 callers on two cores).
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from inferno.errors import ConfigurationError
from inferno.settings import variable

logger = logging.getLogger(__name__)


class Cores:
    """What a process does with the cores that are kept; nothing, where none are."""

    #: How busy cores are is looked at over this time, in seconds, at least. The system counts it in
    #: hundredths.
    LATELY_S = 0.5
    #: With fewer idle cores in the mean, all count as busy. On two cores, two executors of `embed`
    #: that wait whenever they can leave 0.15 of one idle.
    IDLE = 0.25
    #: Of the time of its cores, what a process takes at least to be what makes them busy.
    OWN = 0.5

    def __init__(self, kept: Collection[int]) -> None:
        """See which cores are left for everything else.

        Args:
          kept: numbers of cores, as in `INFERNO_INFERENCE__CORES`.
        Raises:
          ConfigurationError: this process may not use one of them or choose, or none is left.
        """
        self._kept = frozenset(kept)
        self._seen: _Seen | None = None
        self._saturated = False
        if not self._kept:
            return
        before = os.sched_getaffinity(0)
        self._told = False
        if missing := self._kept - _usable(before | self._kept, before):
            raise ConfigurationError(
                f"{variable('inference', 'cores')}: {_listed(missing)}: this process can use the "
                f"cores {_listed(before)}"
            )
        self._others = before - self._kept
        if not self._others:
            raise ConfigurationError(
                f"{variable('inference', 'cores')}: {_listed(self._kept)}: leave at least one of "
                f"the cores {_listed(before)} for everything that is no forward pass"
            )

    def leave(self) -> None:
        """Let this thread run on the other cores, and what it starts from now on."""
        if self._kept:
            self._go(self._others)

    def take(self) -> None:
        """Let this thread run on the cores that are kept, and on no other."""
        if self._kept:
            self._go(self._kept)

    @property
    def saturated(self) -> bool:
        """Whether this process keeps its cores busy, with what else runs on them.

        So it was lately, as far as the system says; at first nothing is known. Where cores are kept
        for passes, nothing else would use what one of these leaves.
        """
        if not self._kept and (self._seen is None or self._seen.age_s >= self.LATELY_S):
            before, self._seen = self._seen, _Seen.now()
            self._saturated = before is not None and self._between(before, self._seen)
        return self._saturated

    def _between(self, before: _Seen, now: _Seen) -> bool:
        passed_s = now.at - before.at
        if not before.idle_s or before.idle_s.keys() != now.idle_s.keys():
            return False
        idle_s = math.fsum(now.idle_s.values()) - math.fsum(before.idle_s.values())
        own_s = now.own_s - before.own_s
        return 0 <= idle_s < self.IDLE * passed_s and own_s >= self.OWN * passed_s * len(now.idle_s)

    def _go(self, cores: Collection[int]) -> None:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as exc:
            # The cores of a container can be changed while it runs. Only speed is lost.
            if not self._told:
                logger.warning("cannot run on the cores %s any more: %s", _listed(cores), exc)
                self._told = True

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Let this thread, and what it starts meanwhile, run on the cores that are kept."""
        self.take()
        try:
            yield
        finally:
            self.leave()


@dataclass(frozen=True)
class _Seen:
    """How busy cores have been until a moment. Times are in seconds."""

    at: float
    #: Of each core of this process, how long it has been idle; empty where the system does not say.
    idle_s: Mapping[int, float]
    #: What this process has taken of them.
    own_s: float

    @classmethod
    def now(cls) -> _Seen:
        """Look."""
        return cls(time.monotonic(), idle_s(), time.process_time())

    @property
    def age_s(self) -> float:
        """How long ago that was."""
        return time.monotonic() - self.at


def idle_s(file: Path = Path("/proc/stat")) -> dict[int, float]:
    """Return how long each core of this process has been idle; nothing where that is not known.

    Elsewhere than on Linux there is no such file, and in some containers it has other cores than
    the process, or only zeros.
    """
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        if (core := re.match(r"cpu(\d+) ", line)) is not None:
            _, _, _, _, idle, waiting, *_ = line.split()
            found[int(core[1])] = (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")
    mine = os.sched_getaffinity(0)
    if not mine <= found.keys() or not any(found[core] for core in mine):
        return {}
    return {core: found[core] for core in mine}


def _usable(cores: Collection[int], before: Collection[int]) -> set[int]:
    """Return those of some cores that this process may use.

    Raises:
      ConfigurationError: it may not choose.
    """
    try:
        # The kernel leaves out what is not there or belongs to others.
        os.sched_setaffinity(0, cores)
        usable = os.sched_getaffinity(0)
        os.sched_setaffinity(0, before)
    except OSError as exc:
        raise ConfigurationError(
            f"{variable('inference', 'cores')}: this process may not choose its cores: {exc}"
        ) from exc
    return usable


def _listed(cores: Collection[int]) -> str:
    return ", ".join(map(str, sorted(cores)))
