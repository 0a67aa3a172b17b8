"""Concurrent calls that travel together.

A round trip to Redis costs about the same for one call as for many. So a call that comes while
others are under way waits for their return, and leaves together with all that came meanwhile; a
lone one leaves at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


class _Call(Generic[T, R]):
    """What one caller asks for, and what came of it."""

    __slots__ = ("answer", "error", "gate", "item", "over")

    def __init__(self, item: T) -> None:
        self.item = item
        # A lock is the cheapest one-shot signal: an Event is made of three of them.
        self.gate = threading.Lock()
        self.gate.acquire()
        self.over = False
        self.answer: R | None = None
        self.error: BaseException | None = None


class Convoy(Generic[T, R]):
    """Gathers the calls of many threads; one of the callers runs each convoy."""

    #: Calls in one convoy, at most: Redis serves nobody else meanwhile.
    MOST = 256

    def __init__(self, run: Callable[[list[T]], list[R]]) -> None:
        """Store what runs a convoy.

        Args:
          run: answers calls together, each in its place; what it raises, all of them raise.
        """
        self._run = run
        self._lock = threading.Lock()
        self._waiting: list[_Call[T, R]] = []
        self._under_way = False

    def call(self, item: T) -> R:
        """Return the answer to one call.

        Raises:
          BaseException: what running its convoy has raised.
        """
        call: _Call[T, R] = _Call(item)
        with self._lock:
            self._waiting.append(call)
            leads = not self._under_way
            self._under_way = True
        if leads:
            # Callers that can go on now come along.
            time.sleep(0)
        else:
            call.gate.acquire()
        if not call.over:
            self._lead()
        if call.error is not None:
            raise call.error
        return cast(R, call.answer)

    def _lead(self) -> None:
        with self._lock:
            calls, self._waiting = self._waiting[: self.MOST], self._waiting[self.MOST :]
        try:
            answers = self._run([call.item for call in calls])
            for call, answer in zip(calls, answers, strict=True):
                call.answer = answer
        except BaseException as exc:
            for call in calls:
                call.error = exc
        with self._lock:
            self._under_way = bool(self._waiting)
            if self._waiting:
                # It is not over: who wakes up with that leads the next convoy.
                self._waiting[0].gate.release()
        for call in calls:
            call.over = True
            call.gate.release()
