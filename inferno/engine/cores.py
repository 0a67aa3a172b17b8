"""CPU cores that are kept for forward passes, see `INFERNO_INFERENCE__CORES`.

    inferno up    leaves them, and so do all processes that it starts
    worker        leaves them; each of its threads takes them for a forward pass
    loading       takes them, so that a runtime's own threads inherit them

A pass that shares its core is interrupted about 200 times per second, even while another core is
idle (`perf sched`, `embed` with 64 callers on two cores).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from inferno.errors import ConfigurationError
from inferno.settings import variable

logger = logging.getLogger(__name__)


class Cores:
    """Moves threads on and off the kept cores; does nothing if none are kept."""

    def __init__(self, kept: Collection[int]) -> None:
        """Find out which cores are left for everything else.

        Args:
          kept: numbers of cores, as in `INFERNO_INFERENCE__CORES`.
        Raises:
          ConfigurationError: this process may not use one of the cores, may not choose its cores,
            or has no other core.
        """
        self._kept = frozenset(kept)
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
                f"the cores {_listed(before)} for everything besides forward passes"
            )

    def leave(self) -> None:
        """Move this thread, and those that it starts later, to the other cores."""
        if self._kept:
            self._go(self._others)

    def take(self) -> None:
        """Move this thread to the kept cores only."""
        if self._kept:
            self._go(self._kept)

    def _go(self, cores: Collection[int]) -> None:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as exc:
            # The cores of a container can change while it runs. Only speed is lost.
            if not self._told:
                logger.warning("cannot run on the cores %s any more: %s", _listed(cores), exc)
                self._told = True

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keep this thread, and those that it starts, on the kept cores for the body."""
        self.take()
        try:
            yield
        finally:
            self.leave()


def _usable(cores: Collection[int], before: Collection[int]) -> set[int]:
    """Return the subset of cores that this process may use.

    Raises:
      ConfigurationError: this process may not choose its cores.
    """
    try:
        # The kernel drops cores that do not exist or are not allowed.
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
