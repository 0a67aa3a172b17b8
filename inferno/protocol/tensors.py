"""Tensors on the wire and in memory.

In memory a tensor is a numpy array; `string` and `bytes` tensors are object arrays of `str` and `bytes`. On the
wire it is ``{"dtype", "shape", "data" | "base64"}``: `data` holds nested or flat lists, `base64` the
little-endian, row-major bytes of a numeric tensor. In JSON, an element of a `bytes` tensor is base64 itself.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inferno.errors import InvalidInput

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

#: Numeric dtypes by their name on the wire.
NUMERIC: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64",
    )
}  # fmt: skip

#: Other names for the same dtypes: torch's, numpy's and the Open Inference Protocol's.
ALIASES: dict[str, str] = {
    "BOOL": "bool",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32", "long": "int64",
    "str": "string", "text": "string", "BYTES": "string", "binary": "bytes",
}  # fmt: skip

DTYPES = (*NUMERIC, "string", "bytes")


def dtype_name(name: str) -> str | None:
    """Return the canonical name of a dtype, or None when there is no such dtype."""
    name = name.removeprefix("torch.")
    return name if name in DTYPES else ALIASES.get(name)


def decode(value: Mapping[str, Any], dtype: str, field: str) -> Array:
    """Turn an explicit tensor of the wire into an array.

    Args:
      value: ``{"dtype", "shape", "data" | "base64"}``; `dtype` may be missing.
      dtype: the dtype that the model's signature declares; the tensor must have it.
      field: where the tensor stands in the request, for errors.
    Returns:
      An array of the declared dtype and the stated shape.
    Raises:
      InvalidInput: names the field and what was expected.
    """
    unknown = value.keys() - {"dtype", "datatype", "shape", "data", "base64", "name", "parameters"}
    if unknown:
        raise InvalidInput(
            f"unknown member {sorted(unknown)[0]!r}; a tensor has dtype, shape, and data or base64", field
        )
    if ("data" in value) == ("base64" in value):
        raise InvalidInput("a tensor has either data or base64, and not both", field)
    _check_dtype(value.get("dtype", value.get("datatype", dtype)), dtype, field)
    if "base64" in value:
        if "shape" not in value:
            raise InvalidInput("a base64 tensor needs its shape", field)
        return _from_base64(value["base64"], dtype, _shape(value["shape"], field), field)
    array = from_values(value["data"], dtype, field)
    if "shape" not in value:
        return array
    shape = _shape(value["shape"], field)
    if math.prod(shape) != array.size:
        raise InvalidInput(
            f"shape {list(shape)} holds {math.prod(shape)} elements, but data has {array.size}", field
        )
    if array.ndim > 1 and array.shape != shape:
        raise InvalidInput(f"shape is {list(shape)}, but data is nested as {list(array.shape)}", field)
    return array.reshape(shape)


def from_values(value: Any, dtype: str, field: str) -> Array:
    """Turn a JSON scalar or (nested) list into an array.

    Raises:
      InvalidInput: a value is of the wrong kind, out of range, not finite, or the lists are ragged.
    """
    if dtype in ("string", "bytes"):
        return _from_texts(value, dtype, field)
    target = NUMERIC[dtype]
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise InvalidInput(f"expected {dtype} values in lists of equal length, got ragged lists", field) from None
    accepted = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[target.kind]
    if array.size and array.dtype.kind not in accepted:
        raise InvalidInput(f"expected {dtype} values, got {_kind(value)}", field)
    if target.kind in "iu" and array.size:
        limits = np.iinfo(target)
        if array.min() < limits.min or array.max() > limits.max:
            raise InvalidInput(f"expected {dtype} values from {limits.min} to {limits.max}", field)
    with np.errstate(over="ignore"):
        array = array.astype(target)
    return _finite(array, dtype, field)


def encode(array: Array, dtype: str, codec: str) -> dict[str, Any]:
    """Turn an array into a tensor of the wire.

    Args:
      array: of the dtype named.
      dtype: the name on the wire.
      codec: `json` keeps numbers as an array (for a JSON writer that knows numpy); `base64` makes text of them.
    """
    head: dict[str, Any] = {"dtype": dtype, "shape": list(array.shape)}
    if dtype == "string":
        return head | {"data": array.tolist()}
    if dtype == "bytes":
        flat = [base64.b64encode(item).decode() for item in array.ravel()]
        return head | {"data": np.array(flat, dtype=object).reshape(array.shape).tolist()}
    if codec == "base64":
        raw = np.ascontiguousarray(array, dtype=NUMERIC[dtype])
        return head | {"base64": base64.b64encode(raw.data).decode() if raw.size else ""}
    # orjson has no half precision.
    return head | {"data": np.ascontiguousarray(array, dtype="f4" if dtype == "float16" else None)}


def _check_dtype(given: Any, expected: str, field: str) -> None:
    name = dtype_name(given) if isinstance(given, str) else None
    if name is None:
        raise InvalidInput(f"unsupported dtype {given!r}; supported are {', '.join(DTYPES)}", field)
    # BYTES is the Open Inference Protocol's one name for both.
    if name != expected and not (given == "BYTES" and expected == "bytes"):
        raise InvalidInput(f"dtype is {name}, but the model expects {expected}", field)


def _shape(value: Any, field: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**31 for n in value):
        raise InvalidInput("shape must be a list of non-negative integers", field)
    return tuple(value)


def _from_base64(text: Any, dtype: str, shape: tuple[int, ...], field: str) -> Array:
    if dtype in ("string", "bytes"):
        raise InvalidInput(f"a {dtype} tensor is given as data, a list with one item for each element", field)
    raw = decode_base64(text, field)
    expected = math.prod(shape) * NUMERIC[dtype].itemsize
    if len(raw) != expected:
        raise InvalidInput(
            f"shape {list(shape)} of {dtype} is {expected} bytes, but base64 holds {len(raw)}", field
        )
    if dtype == "bool" and raw.strip(b"\0\1"):
        raise InvalidInput("a byte of a bool tensor is 0 or 1", field)
    return _finite(np.frombuffer(raw, dtype=NUMERIC[dtype]).reshape(shape), dtype, field)


def decode_base64(text: Any, field: str) -> bytes:
    """Decode standard base64, strictly.

    Raises:
      InvalidInput: it is no text, or no complete base64.
    """
    if not isinstance(text, str):
        raise InvalidInput(f"base64 must be a string, got {_kind(text)}", field)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput("malformed base64: it is truncated or has characters outside its alphabet", field) from None


def _from_texts(value: Any, dtype: str, field: str) -> Array:
    shape: list[int] = []
    level = value
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
        if len(shape) > 32:
            raise InvalidInput("lists are nested more than 32 deep", field)
    flat: list[Any] = value if shape else [value]
    for size in shape[1:]:
        if not all(isinstance(item, list) and len(item) == size for item in flat):
            raise InvalidInput(f"expected {dtype} values in lists of equal length, got ragged lists", field)
        flat = [element for item in flat for element in item]
    for item in flat:
        if not isinstance(item, str):
            raise InvalidInput(f"expected text, got {_kind(item)}", field)
    if dtype == "bytes":
        flat = [decode_base64(_without_data_uri(item), field) for item in flat]
    array = np.empty(len(flat), dtype=object)
    array[:] = flat
    return array.reshape(shape)


def _without_data_uri(text: str) -> str:
    if not text.startswith("data:"):
        return text
    head, _, payload = text.partition(",")
    return payload if head.endswith(";base64") else text


def _finite(array: Array, dtype: str, field: str) -> Array:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(f"expected finite {dtype} values, got NaN, infinity or a number out of range", field)
    return array


def _kind(value: Any) -> str:
    while isinstance(value, list) and value:
        value = next((item for item in value if isinstance(item, list | str | bool | dict | None)), value[0])
    names = {str: "text", bool: "true or false", dict: "an object", list: "an empty list", int: "an integer",
             float: "a fraction", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
