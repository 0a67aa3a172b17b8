"""Turns of the event loop: whoever could go on lets others run, and large requests give way.

gevent switches only where something waits. After `sleep(0)` it may run fifty other greenlets before
it looks at sockets and timers, whatever time each takes. A pause, however short, makes it look.
"""

from __future__ import annotations

import gevent
from gevent.lock import BoundedSemaphore

#: Shortest pause after which gevent has looked at sockets and timers, in seconds.
PAUSE_S = 1e-6
#: Bytes from which on a request is large: to decode it takes milliseconds to tenths of a second.
LARGE_BYTES = 262_144
#: Longest time for which one large request gives way, in seconds.
LULL_S = 0.05

_large = BoundedSemaphore(1)


def pause() -> None:
    """Let everything that is ready run first, clients' sockets included."""
    gevent.sleep(PAUSE_S)


def give_way(size: int) -> None:
    """Wait before a large request is decoded until nothing else needs the process.

    Large requests begin one after the other, so that a small one waits for one of them at most.

    Args:
      size: bytes of the request, decompressed.
    """
    if size >= LARGE_BYTES:
        with _large:
            pause()
            with gevent.Timeout(LULL_S, False):
                gevent.idle()
