"""Concurrent calls that share one round trip (step "submit").

A round trip to Redis costs about the same for one call as for many. A call that arrives while
others are under way waits for their return, and leaves together with all that arrived meanwhile. A
lone call leaves at once. This runs on the threads or greenlets of the web tier.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


class _Call(Generic[T, R]):
    """One call, and its answer or error."""

    __slots__ = ("answer", "error", "item", "over", "woken")

    def __init__(self, item: T) -> None:
        self.item = item
        #: Set when the call is over, or when its thread is to run the next convoy.
        self.woken = threading.Event()
        self.over = False
        self.answer: R | None = None
        self.error: BaseException | None = None


class Convoy(Generic[T, R]):
    """Gathers the calls of many threads. One of the callers runs each convoy."""

    #: Most calls in one convoy: Redis serves nobody else meanwhile.
    MOST = 256

    def __init__(self, run: Callable[[list[T]], list[R]]) -> None:
        """Store the function that runs a convoy.

        Args:
          run: returns the answers to a list of items, in the same order. If it raises, every call
            of the convoy raises the same error.
        """
        self._run = run
        self._lock = threading.Lock()
        self._waiting: list[_Call[T, R]] = []
        self._under_way = False

    def call(self, item: T) -> R:
        """Return the answer to one item.

        Raises:
          BaseException: the error of its convoy.
        """
        call: _Call[T, R] = _Call(item)
        with self._lock:
            self._waiting.append(call)
            leads = not self._under_way
            self._under_way = True
        if leads:
            # Let other threads that are ready join this convoy.
            time.sleep(0)
        else:
            call.woken.wait()
        if not call.over:
            self._lead()
        if call.error is not None:
            try:
                raise call.error
            finally:
                # The error now holds this frame.
                del call
        return cast(R, call.answer)

    def _lead(self) -> None:
        with self._lock:
            calls, self._waiting = self._waiting[: self.MOST], self._waiting[self.MOST :]
        try:
            answers = self._run([call.item for call in calls])
            for call, answer in zip(calls, answers, strict=True):
                call.answer = answer
        except BaseException as exc:
            # Its traceback would hold this frame, and so every item until a garbage collection.
            error = exc.with_traceback(None)
            for call in calls:
                call.error = error
            del error
        with self._lock:
            self._under_way = bool(self._waiting)
            if self._waiting:
                # This call is not over, so its thread runs the next convoy.
                self._waiting[0].woken.set()
        for call in calls:
            call.over = True
            call.woken.set()
