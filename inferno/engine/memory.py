"""How much memory engines need, and how it returns to the system."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable

import psutil


def layers_that_fit(
    device_bytes: int, layer_bytes: int, layers: int, *, kv_cache_bytes: int = 0, safety: int = 0
) -> int:
    """Return how many layers of a model fit on a device; the others stay in the host's memory.

    ``min((device_bytes - kv_cache_bytes - safety) / layer_bytes, layers)``, rounded down. A device
    of 8 GB with a KV cache of 2 GB takes 20 layers of 300 MB, out of 32.

    Args:
      device_bytes: free memory of the device.
      layer_bytes: size of one layer's weights.
      layers: number of layers of the model.
      kv_cache_bytes: size of the keys and values of all sequences that are generated at once.
      safety: bytes to leave free, for activations and other programs.
    Raises:
      ValueError: `layer_bytes` is less than 1.
    """
    if layer_bytes < 1:
        raise ValueError(f"layer_bytes: {layer_bytes}: expected at least 1")
    room = device_bytes - kv_cache_bytes - safety
    return max(0, min(room // layer_bytes, layers))


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


#: Smallest amount of memory for which a garbage collection stops the process. Smaller garbage waits
#: for Python's own collections; if it was frozen at the start, for the next large release.
WORTH_A_PAUSE_BYTES = 8 * 10**6


def release(held_bytes: float, resident_before: int) -> None:
    """Return unused memory to the system and the device.

    Most engines are freed with their last reference. Garbage is collected only if one was not,
    because of reference cycles: a collection takes 50 ms or more, and stops the whole process.

    Args:
      held_bytes: expected decrease of the process's memory; infinite if the memory was elsewhere,
        so that no decrease can be seen.
      resident_before: resident memory before the engine was dropped, in bytes.
    """
    trim()
    freed_bytes = resident_before - resident_bytes()
    if held_bytes > WORTH_A_PAUSE_BYTES and freed_bytes < held_bytes / 2:
        # Include the objects that were frozen at the start: the engine may be among them.
        frozen = gc.get_freeze_count() > 0
        if frozen:
            gc.unfreeze()
        gc.collect()
        if frozen:
            gc.freeze()
        trim()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim() -> None:
    """Return freed memory to the system; glibc keeps it in its arenas."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    # Other C libraries have no such function.
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
