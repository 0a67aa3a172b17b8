"""Keeps a process small that has had large requests: glibc keeps the memory that was used."""

from __future__ import annotations

import ctypes
import gc

#: `M_MMAP_THRESHOLD` of glibc's malloc.h.
_MMAP_THRESHOLD = -3
#: Buffers from this size on get pages of their own, which go back when the buffer is freed.
LARGE_BYTES = 1_000_000


def prepare() -> None:
    """Let large buffers go back to the system at once. Other C libraries ignore it."""
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None:
        setting(_MMAP_THRESHOLD, LARGE_BYTES)


def give_back() -> None:
    """Return all free pages to the system; takes some milliseconds."""
    # Errors refer to the frames that they passed, which may refer to a body and to the error.
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
