"""Tensors on the wire and in memory.

In memory a tensor is a numpy array; `string` and `bytes` tensors are object arrays of `str` and
`bytes`. On the wire it is ``{"dtype", "shape", "data" | "base64"}``: `data` holds nested or flat
lists, `base64` the little-endian, row-major bytes of a numeric tensor. In JSON, each element of a
`bytes` tensor is base64.

The web tier decodes when a task is submitted; the worker decodes inputs and encodes outputs.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from inferno.errors import InvalidInput

Array = npt.NDArray[Any]
Tensors = dict[str, Array]


@dataclass(frozen=True)
class Binary:
    """An input that a client sends as a body of its own, not in JSON."""

    #: One element of a `bytes` tensor, or the little-endian, row-major bytes of a numeric one.
    raw: bytes
    #: Shape of a numeric tensor; None for a `bytes` element.
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Raw:
    """A whole tensor as bytes, as the Open Inference Protocol's binary extension sends it."""

    #: The protocol's name of the dtype, such as `FP32` or `BYTES`.
    datatype: str
    shape: list[int]
    #: Little-endian and row-major. Each element of `BYTES` follows its length (unsigned, 32 bits).
    raw: memoryview


#: Numeric dtypes by their names on the wire.
NUMERIC: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64",
    )
}  # fmt: skip

#: Aliases of the dtypes: names of torch, numpy and the Open Inference Protocol.
ALIASES: dict[str, str] = {
    "BOOL": "bool",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "half": "float16", "float": "float32", "double": "float64",
    "short": "int16", "int": "int32", "long": "int64",
    "str": "string", "text": "string", "BYTES": "string", "binary": "bytes",
}  # fmt: skip

#: Names of the dtypes in the Open Inference Protocol.
DATATYPES: dict[str, str] = {
    "bool": "BOOL",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "string": "BYTES", "bytes": "BYTES",
}  # fmt: skip

DTYPES = (*NUMERIC, "string", "bytes")

#: Maximum number of dimensions, in lists and shapes. numpy allows 64.
MAX_DIMENSIONS = 32

#: Largest product of the sizes of a shape that are not zero. numpy counts bytes in 64 bits.
_MAX_ELEMENTS = 2**48

#: Python types of elements in JSON, by the kind of numpy's dtype. A float may be sent as `1`.
_ELEMENTS: dict[str, frozenset[type]] = {
    "b": frozenset({bool}), "i": frozenset({int}), "u": frozenset({int}),
    "f": frozenset({int, float}), "O": frozenset({str}),
}  # fmt: skip

#: Members of an explicit tensor.
_MEMBERS = frozenset({"dtype", "datatype", "shape", "data", "base64", "name", "parameters"})

#: Raises InvalidInput for a shape that is wrong or too large.
CheckShape = Callable[[tuple[int, ...]], None]


def dtype_name(name: str) -> str | None:
    """Return the canonical name of a dtype, or None for an unknown one."""
    name = name.removeprefix("torch.")
    return name if name in DTYPES else ALIASES.get(name)


def decode(
    value: Mapping[str, Any], dtype: str, field: str, check: CheckShape | None = None
) -> Array:
    """Turn an explicit tensor of the wire into an array.

    Args:
      value: ``{"dtype", "shape", "data" | "base64"}``; `dtype` may be missing.
      dtype: the dtype that the model's signature declares; the tensor must have it.
      field: the tensor's place in the request, for errors.
      check: refuses a shape, before any element is converted.
    Returns:
      An array with the declared dtype and the tensor's shape.
    Raises:
      InvalidInput: the tensor is wrong; names the field and what is expected.
    """
    unknown = value.keys() - _MEMBERS
    if unknown:
        raise InvalidInput(
            f"unknown member {min(map(str, unknown))!r}; a tensor has dtype, shape, and data or "
            "base64",
            field,
        )
    if ("data" in value) == ("base64" in value):
        raise InvalidInput("a tensor has either data or base64, not both", field)
    _check_dtype(value.get("dtype", value.get("datatype", dtype)), dtype, field)
    shape = _shape(value["shape"], field) if "shape" in value else None
    if shape is not None and check is not None:
        check(shape)
    if "base64" in value:
        if shape is None:
            raise InvalidInput("a base64 tensor needs its shape", field)
        return _from_base64(value["base64"], dtype, shape, field)
    if shape is None:
        return from_values(value["data"], dtype, field, check)
    elements, nested = _flattened(value["data"], dtype, field)
    if _size(shape, field) != len(elements):
        raise InvalidInput(
            f"shape {list(shape)} holds {_size(shape, field)} elements, but data has "
            f"{len(elements)}",
            field,
        )
    if elements and len(nested) > 1 and nested != shape:
        raise InvalidInput(f"shape is {list(shape)}, but data is nested as {list(nested)}", field)
    return _converted(elements, shape, dtype, field)


def from_values(value: Any, dtype: str, field: str, check: CheckShape | None = None) -> Array:
    """Turn a JSON scalar or (nested) list into an array.

    Args:
      value: the scalar or list.
      dtype: the dtype of the array.
      field: the tensor's place in the request, for errors.
      check: refuses a shape, before any element is converted.
    Raises:
      InvalidInput: a value has the wrong type, is out of range or not finite, or lists are ragged.
    """
    elements, shape = _flattened(value, dtype, field)
    if check is not None:
        check(shape)
    return _converted(elements, shape, dtype, field)


def _flattened(value: Any, dtype: str, field: str) -> tuple[list[Any], tuple[int, ...]]:
    """Check that a value is an element or a (nested) list of elements.

    numpy would accept "1", null and true as numbers, and pad texts to the longest.

    Returns:
      The elements in row-major order, and the shape.
    """
    shape: list[int] = []
    level = [value]
    while level and type(level[0]) is list:
        if len(shape) == MAX_DIMENSIONS:
            raise InvalidInput(f"lists are nested more than {MAX_DIMENSIONS} deep", field)
        size = len(level[0])
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            raise _ragged(dtype, field)
        shape.append(size)
        level = list(chain.from_iterable(level))
    allowed = _ELEMENTS[NUMERIC[dtype].kind if dtype in NUMERIC else "O"]
    if not allowed.issuperset(map(type, level)):
        raise _mistyped(level, shape, allowed, dtype, field)
    return level, tuple(shape)


def _converted(elements: list[Any], shape: tuple[int, ...], dtype: str, field: str) -> Array:
    """Turn checked elements into an array."""
    if dtype not in NUMERIC:
        if dtype == "bytes":
            elements = [decode_base64(_without_data_uri(text), field) for text in elements]
        # np.array would inspect each text to see whether it is a sequence.
        array = np.empty(len(elements), dtype=object)
        array[:] = elements
        return array.reshape(shape)
    target = NUMERIC[dtype]
    try:
        with np.errstate(over="ignore"):
            array = np.array(elements, dtype=target).reshape(shape)
    except OverflowError:
        if target.kind == "f":
            raise _infinite(dtype, field) from None
        limits = np.iinfo(target)
        raise InvalidInput(
            f"expected {dtype} values from {limits.min} to {limits.max}", field
        ) from None
    return _finite(array, dtype, field)


def from_binary(value: Binary, dtype: str, field: str, check: CheckShape | None = None) -> Array:
    """Turn a binary input into an array.

    Args:
      value: the input.
      dtype: the dtype of the array.
      field: the tensor's place in the request, for errors.
      check: refuses a shape, before any element is converted.
    Returns:
      An array with the input's shape; without dimensions for one element of a `bytes` tensor.
    Raises:
      InvalidInput: the number of bytes does not match the shape, or the dtype needs JSON.
    """
    if dtype == "string":
        raise InvalidInput("a string tensor must be sent as JSON, not as a binary body", field)
    if dtype == "bytes":
        if value.shape is not None:
            raise InvalidInput(
                "a binary body is one element of a bytes tensor and has no shape", field
            )
        array = np.empty((), dtype=object)
        array[()] = value.raw
        return array
    if value.shape is None:
        raise InvalidInput(f"a binary tensor of {dtype} needs its shape", field)
    if check is not None:
        check(value.shape)
    return _from_bytes(value.raw, dtype, value.shape, "the body", field)


def from_raw(value: Raw, dtype: str, field: str, check: CheckShape | None = None) -> Array:
    """Turn a tensor of the Open Inference Protocol's binary extension into an array.

    BF16, which numpy lacks, is widened for a model that takes float32.

    Args:
      value: the tensor.
      dtype: the dtype of the array.
      field: the tensor's place in the request, for errors.
      check: refuses a shape, before any element is converted.
    Raises:
      InvalidInput: the bytes do not match the shape, or the datatype is not the declared one.
    """
    shape = _shape(value.shape, field)
    if check is not None:
        check(shape)
    if value.datatype == "BF16" and dtype == "float32":
        halves = _from_bytes(value.raw, "uint16", shape, "the binary data", field)
        return _finite((halves.astype("<u4") << 16).view("<f4"), dtype, field)
    _check_dtype(value.datatype, dtype, field)
    if dtype in NUMERIC:
        return _from_bytes(value.raw, dtype, shape, "the binary data", field)
    size = _size(shape, field)
    elements = _unframed(value.raw, size, field)
    if len(elements) != size:
        raise InvalidInput(
            f"shape {list(shape)} holds {size} elements, but the binary data has "
            f"{len(elements) if len(elements) < size else 'more'}",
            field,
        )
    array = np.empty(len(elements), dtype=object)
    try:
        array[:] = [item.decode() for item in elements] if dtype == "string" else elements
    except UnicodeDecodeError as exc:
        raise InvalidInput(f"expected text in UTF-8: {exc.reason}", field) from None
    return array.reshape(shape)


def _unframed(raw: memoryview, size: int, field: str) -> list[bytes]:
    """Return the elements of a BYTES tensor; at most one more than its shape holds."""
    elements: list[bytes] = []
    at, end = 0, len(raw)
    while at < end and len(elements) <= size:
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        if start > end or at > end:
            raise InvalidInput(
                "the binary data ends within an element; each element follows its length, 4 bytes "
                "little-endian",
                field,
            )
        elements.append(bytes(raw[start:at]))
    return elements


def framed(elements: Iterable[bytes]) -> bytes:
    """Encode the elements of a BYTES tensor as the protocol does: each one after its length."""
    return b"".join(len(item).to_bytes(4, "little") + item for item in elements)


def dtype_of(array: Array) -> str:
    """Return the wire name of an array's dtype. An object array must have an element."""
    if not array.dtype.hasobject:
        return array.dtype.name
    return "string" if isinstance(array.item(0), str) else "bytes"


def of_dtype(array: Array, dtype: str, field: str) -> Array:
    """Check the dtype of an array and return the array.

    Raises:
      InvalidInput: the array has another dtype.
    """
    _check_dtype(dtype_of(array), dtype, field)
    return array


def encode(array: Array, dtype: str, codec: str) -> dict[str, Any]:
    """Turn an array into an explicit tensor of the wire.

    Args:
      array: array with elements of the dtype.
      dtype: the dtype's wire name.
      codec: `json` leaves numbers as an array, for a JSON writer that knows numpy; `base64` encodes
        them as text.
    """
    head: dict[str, Any] = {"dtype": dtype, "shape": list(array.shape)}
    if dtype == "string":
        return head | {"data": array.tolist()}
    if dtype == "bytes":
        flat = [base64.b64encode(item).decode() for item in array.ravel()]
        return head | {"data": np.array(flat, dtype=object).reshape(array.shape).tolist()}
    array = np.asarray(array, dtype=NUMERIC[dtype], order="C")
    if codec == "base64":
        return head | {"base64": base64.b64encode(array.tobytes()).decode()}
    # Not every JSON writer that knows arrays also writes those without dimensions.
    return head | {"data": array if array.ndim else array.item()}


def _check_dtype(given: Any, expected: str, field: str) -> None:
    name = dtype_name(given) if isinstance(given, str) else None
    if name is None:
        plain = isinstance(given, str | int | float | None)
        shown = repr(given) if plain else "that is not a string"
        raise InvalidInput(f"unsupported dtype {shown}; supported are {', '.join(DTYPES)}", field)
    # The Open Inference Protocol uses BYTES for both string and bytes.
    if name != expected and not (given == "BYTES" and expected == "bytes"):
        raise InvalidInput(f"dtype is {name}, but the model expects {expected}", field)


def _shape(value: Any, field: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**31 for n in value):
        raise InvalidInput("shape must be a list of non-negative integers", field)
    if len(value) > MAX_DIMENSIONS:
        raise InvalidInput(f"expected at most {MAX_DIMENSIONS} dimensions, got {len(value)}", field)
    return tuple(value)


def _size(shape: tuple[int, ...], field: str) -> int:
    """Return the number of elements of a shape.

    Raises:
      InvalidInput: numpy cannot represent the shape, although it has no elements.
    """
    size = math.prod(shape)
    if not size and math.prod(filter(None, shape)) > _MAX_ELEMENTS:
        raise InvalidInput(f"shape {list(shape)} is too large", field)
    return size


def _from_base64(text: Any, dtype: str, shape: tuple[int, ...], field: str) -> Array:
    if dtype in ("string", "bytes"):
        raise InvalidInput(
            f"a {dtype} tensor needs data, a list with one item for each element", field
        )
    return _from_bytes(decode_base64(text, field), dtype, shape, "base64", field)


def _from_bytes(
    raw: bytes | memoryview, dtype: str, shape: tuple[int, ...], holder: str, field: str
) -> Array:
    expected = _size(shape, field) * NUMERIC[dtype].itemsize
    if len(raw) != expected:
        raise InvalidInput(
            f"shape {list(shape)} of {dtype} is {expected} bytes, but {holder} holds {len(raw)}",
            field,
        )
    if dtype == "bool" and bytes(raw).strip(b"\0\1"):
        raise InvalidInput("every byte of a bool tensor must be 0 or 1", field)
    return _finite(np.frombuffer(raw, dtype=NUMERIC[dtype]).reshape(shape), dtype, field)


def decode_base64(text: Any, field: str) -> bytes:
    """Decode standard base64, strictly.

    Raises:
      InvalidInput: the value is not a string, or not complete base64.
    """
    if not isinstance(text, str):
        raise InvalidInput("base64 must be a string", field)
    try:
        # Five times as fast as binascii, and just as strict.
        return msgspec.convert(text, bytes)
    except (msgspec.ValidationError, UnicodeError):
        raise InvalidInput(
            "malformed base64: it is truncated or has characters outside its alphabet", field
        ) from None


def _mistyped(
    elements: list[Any], shape: Sequence[int], allowed: frozenset[type], dtype: str, field: str
) -> InvalidInput:
    """Describe the first element of a wrong type."""
    at, wrong = next((n, one) for n, one in enumerate(elements) if type(one) not in allowed)
    if shape and type(wrong) is list:
        return _ragged(dtype, field)
    place = "".join(f"[{index}]" for index in np.unravel_index(at, shape)) if shape else ""
    got = _KINDS.get(type(wrong), type(wrong).__name__)
    return InvalidInput(
        f"expected {dtype} values, got {got}" + (f" at {place}" if place else ""), field
    )


def _ragged(dtype: str, field: str) -> InvalidInput:
    return InvalidInput(
        f"expected {dtype} values in lists of equal length, got ragged lists", field
    )


def _without_data_uri(text: str) -> str:
    if not text.startswith("data:"):
        return text
    head, _, payload = text.partition(",")
    return payload if head.endswith(";base64") else text


def _finite(array: Array, dtype: str, field: str) -> Array:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _infinite(dtype, field)
    return array


def _infinite(dtype: str, field: str) -> InvalidInput:
    return InvalidInput(
        f"expected finite {dtype} values, got NaN, infinity or a number out of range", field
    )


#: JSON types as errors name them.
_KINDS: dict[type, str] = {
    str: "text", bool: "true or false", dict: "an object", list: "a list",
    int: "an integer", float: "a fraction", type(None): "null",
}  # fmt: skip
