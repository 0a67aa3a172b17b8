"""How many bytes the sockets of a process hold together, and who is closed when they are too many.

What counts is what a client can make grow: a message that is still arriving, one that is being
handled, and those that wait to be sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Share:
    """The bytes that one socket holds."""

    def __init__(self, budget: Budget, evict: Callable[[], None]) -> None:
        self._budget = budget
        self.evict = evict
        self.held = 0
        self.evicted = False
        #: When the client last sent or took bytes.
        self.progressed_at = time.monotonic()

    def take(self, size: int, *, patient: bool = False) -> None:
        """Hold more bytes; where there are too many, a socket is closed for them.

        Args:
          size: number of bytes.
          patient: first wait a moment for others to give bytes back.
        """
        if size:
            self._budget.take(self, size, patient)

    def give(self, size: int) -> None:
        """Hold fewer bytes."""
        if size:
            self._budget.give(self, size)

    def progress(self) -> None:
        """Note that the client has sent or taken bytes."""
        self.progressed_at = time.monotonic()

    def waste(self, now: float) -> float:
        """Return what the share costs: its bytes, for as long as its client has done nothing."""
        return self.held * (now - self.progressed_at)


class Budget:
    """The bytes of all sockets of a process."""

    #: How long a taker waits for others to give bytes back, in seconds.
    PATIENCE_S = 1.0

    def __init__(self, most: int) -> None:
        """Begin with nothing held.

        Args:
          most: bytes that all sockets may hold together. One message always fits.
        """
        self._most = most
        self._held = 0
        self._shares: set[Share] = set()
        # The reentrant lock of a condition would take several times as long for each message.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._patient = 0

    @property
    def held(self) -> int:
        """Bytes that all sockets hold now."""
        return self._held

    def join(self, evict: Callable[[], None]) -> Share:
        """Return the share of a new socket.

        Args:
          evict: closes the socket and drops what it holds; called at most once.
        """
        share = Share(self, evict)
        with self._changed:
            self._shares.add(share)
        return share

    def leave(self, share: Share) -> None:
        """End a share; what it holds is free."""
        with self._changed:
            self._drop(share)
            self._changed.notify_all()

    def take(self, share: Share, size: int, patient: bool) -> None:
        """Hold bytes for a share; see `Share.take`."""
        victims: list[Share] = []
        with self._lock:
            if not self._fits(size):
                victims = self._make_room(size, patient)
            if not share.evicted:
                share.held += size
                self._held += size
        for victim in victims:
            victim.evict()

    def give(self, share: Share, size: int) -> None:
        """Give back bytes of a share; see `Share.give`."""
        with self._lock:
            if not share.evicted:
                share.held -= size
                self._held -= size
                if self._patient:
                    self._changed.notify_all()

    def _make_room(self, size: int, patient: bool) -> list[Share]:
        """Wait or drop shares until some bytes fit; return the dropped ones."""
        if patient:
            self._patient += 1
            self._changed.wait_for(lambda: self._fits(size), self.PATIENCE_S)
            self._patient -= 1
        victims = []
        while not self._fits(size):
            now = time.monotonic()
            victims.append(max(self._shares, key=lambda one: one.waste(now)))
            self._drop(victims[-1])
        return victims

    def _fits(self, size: int) -> bool:
        return not self._held or self._held + size <= self._most

    def _drop(self, share: Share) -> None:
        if not share.evicted:
            share.evicted = True
            self._shares.discard(share)
            self._held -= share.held
            share.held = 0
