"""Memory of a web process: what large requests took goes back to the system."""

from __future__ import annotations

import ctypes
import gc

#: Size from which glibc maps a block by itself, and returns it as soon as it is freed; in bytes.
MAPPED_BYTES = 262_144
#: glibc's number of this parameter (`M_MMAP_THRESHOLD` in malloc.h).
_MMAP_THRESHOLD = -3


def return_large_blocks() -> None:
    """Return large blocks to the system when they are freed.

    By itself, glibc raises the size with each larger block that is freed, up to 32 MiB, and keeps
    what is below it: a process would stay as large as its busiest moment was.
    """
    # Other C libraries have no such function.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)


def give_back() -> None:
    """Return all free pages to the system; takes some milliseconds."""
    # Errors refer to the frames that they passed, which may refer to a body and to the error.
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
