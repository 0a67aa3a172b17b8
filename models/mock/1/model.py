"""A simulated model: it sleeps like an accelerator at work, and fails on request.

Latency and chance of failure come from `parameters` in model.yaml. Some texts have effects:

- `poison!` raises a ValueError in the forward pass, so the whole batch fails; a platform that
  isolates bad members finds it and lets its mates succeed.
- `sleep:<ms>` makes the pass take at least that long; the longest of a batch counts.
- A pass with only `warm-up!` never fails, so that a model that is meant to fail can be loaded.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from inferno.runtimes import ModelContext

Arrays = dict[str, npt.NDArray[Any]]

POISON = "poison!"
WARM_UP = "warm-up!"
#: Longest pass that a text may request, in ms; an hour would be a typo.
MAX_SLEEP_MS = 600_000.0
_SLEEP = re.compile(r"sleep:(\d+(?:\.\d+)?)")


class Transient(RuntimeError):
    """A failure that may not happen again."""

    #: Read by the platform: the members of the batch are retried.
    transient = True


@dataclass(frozen=True)
class Behaviour:
    """How the model behaves; the fields are the names in `parameters`."""

    #: Duration of every pass, in ms.
    latency_ms: float = 5.0
    #: Added for each row, in ms.
    latency_per_row_ms: float = 0.05
    #: Largest random addition, in ms.
    jitter_ms: float = 0.0
    #: Passes of a hundred that fail with a transient error.
    failure_percent: float = 0.0
    #: Passes of a hundred that fail for good.
    fatal_percent: float = 0.0
    #: Larger batches run out of memory; None for no limit.
    memory_error_above_rows: int | None = None
    #: Seed of the randomness.
    seed: int = 0

    @classmethod
    def read(cls, parameters: Mapping[str, Any]) -> Behaviour:
        """Validate parameters.

        Raises:
          ValueError: names the parameter, its value and the expectation.
        """
        known = [field.name for field in fields(cls)]
        for name, value in parameters.items():
            if name not in known:
                raise ValueError(f"parameters.{name}: unknown; expected one of {', '.join(known)}")
            expected = _mismatch(name, value)
            if expected:
                raise ValueError(f"parameters.{name}: {value!r}: expected {expected}")
        behaviour = cls(**parameters)
        if behaviour.failure_percent + behaviour.fatal_percent > 100:
            raise ValueError("parameters: failure_percent and fatal_percent are over 100 together")
        return behaviour


def _mismatch(name: str, value: Any) -> str | None:
    """Return what is expected of a parameter, or None if its value fits."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name == "seed":
        return None if whole else "a whole number"
    if name == "memory_error_above_rows":
        return (
            None
            if value is None or (whole and value >= 0)
            else "a whole number of at least 0, or null"
        )
    most = 100.0 if name.endswith("_percent") else MAX_SLEEP_MS
    fits = (whole or isinstance(value, float)) and 0 <= value <= most
    return None if fits else f"a number from 0 to {most:g}"


class Mock:
    """The model."""

    def __init__(self, behaviour: Behaviour) -> None:
        """Store the behaviour."""
        self._behaviour = behaviour
        self._random = random.Random(behaviour.seed)

    def preprocess(self, inputs: Arrays) -> Arrays:
        """Refuse tasks that request too long a sleep.

        Raises:
          ValueError: names the input and the limit.
        """
        for text in inputs["text"]:
            if _asked_sleep_ms(text) > MAX_SLEEP_MS:
                raise ValueError(f"text: {text!r}: expected a sleep of at most {MAX_SLEEP_MS:g} ms")
        return inputs

    def __call__(self, inputs: Arrays) -> Arrays:
        """Sleep, then return the texts and how long the pass took.

        Args:
          inputs: `text`, object array of str [rows].
        Returns:
          `text` unchanged, and `latency_ms`, float32 [rows].
        Raises:
          MemoryError: the batch has too many rows.
          ValueError: one of the texts is `poison!`.
          Transient: at random, by `failure_percent`.
          RuntimeError: at random, by `fatal_percent`.
        """
        start = time.perf_counter()
        behaviour = self._behaviour
        texts = inputs["text"]
        may_fail = any(text != WARM_UP for text in texts)
        limit = behaviour.memory_error_above_rows
        if may_fail and limit is not None and len(texts) > limit:
            raise MemoryError(f"mock: {len(texts)} rows do not fit; at most {limit} do")
        latency_ms = (
            behaviour.latency_ms
            + behaviour.latency_per_row_ms * len(texts)
            + self._random.uniform(0, behaviour.jitter_ms)
        )
        time.sleep(max(latency_ms, *map(_asked_sleep_ms, texts)) / 1e3)
        # Failures come after the sleep, because a real pass takes time before it fails.
        if may_fail:
            self._fail(texts)
        took_ms = (time.perf_counter() - start) * 1e3
        return {"text": texts, "latency_ms": np.full(len(texts), took_ms, np.float32)}

    def _fail(self, texts: npt.NDArray[Any]) -> None:
        if POISON in texts:
            raise ValueError("mock: poisoned batch")
        chance = self._random.uniform(0, 100)
        if chance < self._behaviour.failure_percent:
            raise Transient("mock: transient failure")
        if chance < self._behaviour.failure_percent + self._behaviour.fatal_percent:
            raise RuntimeError("mock: fatal failure")


def _asked_sleep_ms(text: str) -> float:
    match = _SLEEP.fullmatch(text)
    return float(match[1]) if match else 0.0


def build(context: ModelContext) -> Mock:
    """Build the model from `parameters`.

    Raises:
      ValueError: a parameter is unknown or out of range.
    """
    return Mock(Behaviour.read(context.parameters))
