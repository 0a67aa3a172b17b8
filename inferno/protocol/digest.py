"""A digest of validated inputs. Tasks with equal digests may share a result."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from inferno.protocol.tensors import Tensors


def digest(inputs: Tensors) -> str:
    """Return a digest of the names, dtypes, shapes and values of arrays, as 32 hex digits.

    Args:
      inputs: as `Signature.parse` returns them.
    """
    found = blake2b(digest_size=16)
    for name in sorted(inputs):
        array = inputs[name]
        found.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode())
        if not array.dtype.hasobject:
            found.update(np.ascontiguousarray(array).data)
            continue
        for item in array.ravel():
            raw = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
            # The length keeps ["ab", "c"] and ["a", "bc"] apart.
            found.update(len(raw).to_bytes(8, "little"))
            found.update(raw)
    return found.hexdigest()
