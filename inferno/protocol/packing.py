"""Tensors as MessagePack, for inputs that are too large for a message.

Step *submit*: the web tier packs large inputs under a key of their own (a claim). Step *forward*:
the worker unpacks them. A numeric tensor is packed as its bytes, a `bytes` tensor as the bytes of
its elements.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from inferno.protocol import tensors
from inferno.protocol.tensors import Array, Tensors


class _Packed(msgspec.Struct, array_like=True):
    """One tensor."""

    #: Name of the dtype, from `tensors.DTYPES`.
    dtype: str
    shape: tuple[int, ...]
    #: Little-endian, row-major bytes, or the elements of a `string` or `bytes` tensor.
    data: Any


_decode = msgspec.msgpack.Decoder(dict[str, _Packed]).decode


def size(inputs: Tensors) -> int:
    """Return the size of inputs in bytes. A character of a text counts as one byte.

    Args:
      inputs: as `Signature.parse` returns them.
    """
    total = 0
    for array in inputs.values():
        total += sum(map(len, array.flat)) if array.dtype.hasobject else array.nbytes
    return total


def pack(inputs: Tensors) -> bytes:
    """Pack inputs.

    Args:
      inputs: as `Signature.parse` returns them.
    """
    return msgspec.msgpack.encode({name: _packed(array) for name, array in inputs.items()})


def unpack(payload: bytes) -> Tensors:
    """Unpack inputs. Numeric arrays are read-only views of the payload.

    Raises:
      ValueError: the payload is not packed inputs.
    """
    return {name: _unpacked(packed) for name, packed in _read(payload).items()}


def in_json(payload: bytes) -> dict[str, Any]:
    """Return packed inputs as explicit tensors for JSON.

    Raises:
      ValueError: the payload is not packed inputs.
    """
    return {
        name: tensors.encode(_unpacked(packed), packed.dtype, "base64")
        for name, packed in _read(payload).items()
    }


def _read(payload: bytes) -> dict[str, _Packed]:
    try:
        return _decode(payload)
    except msgspec.DecodeError as exc:
        raise ValueError(f"expected packed tensors: {exc}") from None


def _packed(array: Array) -> _Packed:
    objects = array.dtype.hasobject
    data = array.ravel().tolist() if objects else np.ascontiguousarray(array).data
    return _Packed(tensors.dtype_of(array), array.shape, data)


def _unpacked(packed: _Packed) -> Array:
    if packed.dtype in tensors.NUMERIC:
        dtype = tensors.NUMERIC[packed.dtype]
        return np.frombuffer(packed.data, dtype=dtype).reshape(packed.shape)
    kind = str if packed.dtype == "string" else bytes
    if len(packed.data) != math.prod(packed.shape) or not {kind}.issuperset(map(type, packed.data)):
        raise ValueError(f"expected {math.prod(packed.shape)} elements of {packed.dtype}")
    array = np.empty(len(packed.data), dtype=object)
    array[:] = packed.data
    return array.reshape(packed.shape)
