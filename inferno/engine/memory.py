"""What engines need of a machine's memory, and how it is given back."""

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
    """Say how many layers of a model fit on a device; the others stay in the host's memory.

    ``min((device_bytes - kv_cache_bytes - safety) / layer_bytes, layers)``, rounded down. A device
    of 8 GB with a KV cache of 2 GB takes 20 layers of 300 MB, of a model that has 32.

    Args:
      device_bytes: free on the device.
      layer_bytes: of one layer's weights.
      layers: of the model.
      kv_cache_bytes: for the keys and values of all sequences that are generated at once.
      safety: bytes that are left free, for activations and what others take.
    Raises:
      ValueError: a layer has no size.
    """
    if layer_bytes < 1:
        raise ValueError(f"layer_bytes: {layer_bytes}: expected at least 1")
    room = device_bytes - kv_cache_bytes - safety
    return max(0, min(room // layer_bytes, layers))


def resident_bytes() -> int:
    """Return the memory that this process has resident, in bytes."""
    return int(psutil.Process().memory_info().rss)


#: For less, the process is not stopped: what refers to itself then stays until Python looks for
#: garbage by itself, and what was frozen at the start until something larger goes.
WORTH_A_PAUSE_BYTES = 8 * 10**6


def release(held_bytes: float, resident_before: int) -> None:
    """Give memory that nothing uses any more back to the system and the device.

    Most engines are gone as soon as nobody refers to them. Garbage is collected only where one is
    not, because its objects refer to each other: that takes 50 ms or more, in which nothing else of
    the process runs.

    Args:
      held_bytes: by how much the process's memory should have shrunk; infinite if what was let go
        of is elsewhere, so that this cannot be seen.
      resident_before: the resident memory before it was let go of, in bytes.
    """
    trim()
    freed_bytes = resident_before - resident_bytes()
    if held_bytes > WORTH_A_PAUSE_BYTES and freed_bytes < held_bytes / 2:
        # What was frozen at the start is looked through as well: an engine may be among it.
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
    """Give freed memory back to the system; glibc keeps it in its arenas."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    # Other C libraries have none.
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
