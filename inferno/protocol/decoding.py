"""Decoding of request bodies and URL parameters, with errors that name the field.

Step *submit*: msgspec decodes and checks; its errors are reworded for clients here.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from inferno.errors import InvalidField, InvalidRequest
from inferno.protocol.limits import Limits

#: Bodies of at least this many bytes are decoded without garbage collections.
_LARGE = 100_000
#: All bytes but those that tell the structure of JSON.
_CONTENT = bytes(set(range(256)) - set(b'"[]{},:'))
#: Change of the depth by each byte.
_NESTING = np.zeros(256, np.int8)
_NESTING[list(b"[{")] = 1
_NESTING[list(b"]}")] = -1

_T = TypeVar("_T")


def convert_query(query: Mapping[str, Any], kind: type[_T]) -> _T:
    """Read the parameters of a URL.

    Args:
      query: a text or a list of texts by parameter name.
      kind: the struct to return.
    Raises:
      InvalidField: a parameter is wrong, missing or unknown; names the parameter.
    """
    try:
        return msgspec.convert(query, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise explain(exc, kind) from None


def decode(body: bytes | bytearray | str, kind: type[_T], limits: Limits) -> _T:
    """Read JSON that is an object.

    Args:
      body: the JSON, as bytes or as text.
      kind: the struct or mapping to return.
      limits: maximum depth, values and members of the JSON.
    Raises:
      InvalidRequest: the JSON exceeds a limit or does not decode to the struct; names the field.
    """
    if not body:
        raise InvalidRequest("expected a JSON object, got an empty body")
    _check_structure(body, limits)
    try:
        return _decode(body, kind)
    except msgspec.ValidationError as exc:
        raise explain(exc, kind) from None
    except (msgspec.DecodeError, UnicodeError) as exc:
        raise InvalidRequest(f"the body is not valid JSON: {exc}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def _decode(body: bytes | bytearray | str, kind: type[_T]) -> _T:
    if len(body) < _LARGE or not gc.isenabled():
        return msgspec.json.decode(body, type=kind)
    # Every new list counts towards the next collection, which would search all of them in vain:
    # a million lists take 45 ms instead of 290.
    gc.disable()
    try:
        return msgspec.json.decode(body, type=kind)
    finally:
        gc.enable()


def _check_structure(body: bytes | bytearray | str, limits: Limits) -> None:
    """Refuse JSON whose decoding would take too much time or memory.

    Counting single bytes is hundreds of times as fast as decoding. The first counts include what is
    in texts, so they are upper bounds; only JSON beyond them is looked at more closely.

    Raises:
      InvalidRequest: the JSON is nested too deeply, or has too many values or members.
    """
    raw = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    opened = raw.count(b"[") + raw.count(b"{")
    # Texts are names of members, or items of inputs, and take ten times as long as numbers.
    texts = limits.json_members + limits.items
    if (
        opened <= limits.json_depth
        and raw.count(b'"') <= 2 * texts
        and opened + raw.count(b",") < limits.json_values
        and raw.count(b":") <= limits.json_members
    ):
        return
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    if plain.count(b'"') > 2 * texts:
        raise _too_large(f"{texts} names and texts")
    structure = _structure(plain)
    if structure.count(b":") > limits.json_members:
        raise _too_large(f"{limits.json_members} members of objects")
    opened = structure.count(b"[") + structure.count(b"{")
    # Each value but the first of its list or object follows a comma.
    if opened + structure.count(b",") >= limits.json_values:
        raise _too_large(f"{limits.json_values} values")
    if opened > limits.json_depth:
        depth = np.cumsum(_NESTING[np.frombuffer(structure, np.uint8)], dtype=np.int32)
        if depth.max() > limits.json_depth:
            raise InvalidRequest(f"expected JSON nested at most {limits.json_depth} deep")


def _too_large(most: str) -> InvalidRequest:
    return InvalidRequest(
        f"expected JSON with at most {most}; send large tensors as base64 or as a binary body"
    )


def _structure(plain: bytes | bytearray) -> bytes:
    """Return the brackets, commas and colons of JSON that are not in texts, in their order.

    Args:
      plain: JSON without escaped quotes.
    """
    marks = np.frombuffer(plain.translate(None, _CONTENT), np.uint8)
    quotes = marks == ord('"')
    # A mark is in a text if the number of quotes before it is odd.
    outside = ~(np.bitwise_xor.accumulate(quotes) | quotes)
    return bytes(marks[outside])


def explain(exc: msgspec.ValidationError, kind: type) -> InvalidRequest:
    """Reword an error of msgspec for clients.

    Args:
      exc: the error that msgspec raised.
      kind: the struct that msgspec tried to decode.
    """
    # For mappings, msgspec also tells whether the key or the value is wrong.
    text, _, path = str(exc).replace("`key` in ", "").partition(" - at `$")
    path, member = path.rstrip("`").lstrip("."), ""
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text):
        member, text = unknown[1], f"unknown field {unknown[1]!r}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text):
        member, text = missing[1], f"missing field {missing[1]!r}"
    field = ".".join(filter(None, (path, member))) or None
    if field is not None and (found := re.fullmatch(r"Invalid enum value (.*)", text, re.DOTALL)):
        text = f"expected {_choices(kind, field.partition('[')[0])}, got {found[1]}"
    elif field is not None and text.startswith("Expected `int` "):
        text = _range(kind, field) or text
    return InvalidRequest(text) if field is None else InvalidField(text, field)


@functools.cache
def _range(kind: type, field: str) -> str | None:
    """Describe the allowed integers of a field; None if it has no lowest and highest one."""
    info = msgspec.inspect.type_info(kind)
    fields = info.fields if isinstance(info, msgspec.inspect.StructType) else ()
    for found in (one.type for one in fields if one.encode_name == field):
        number = found.type if isinstance(found, msgspec.inspect.Metadata) else found
        if isinstance(number, msgspec.inspect.IntType) and None not in (number.ge, number.le):
            return f"expected an integer from {number.ge} to {number.le}"
    return None


@functools.cache
def _choices(kind: type, field: str) -> str:
    """Describe the allowed values of a field that holds one of several texts, or a list of them."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    (found,) = [one.type for one in info.fields if one.encode_name == field]
    *others, last = _literals(found)
    return f"{', '.join(others)} or {last}" if others else last


def _literals(info: msgspec.inspect.Type) -> Iterator[str]:
    match info:
        case msgspec.inspect.LiteralType():
            yield from map(str, info.values)
        case msgspec.inspect.EnumType():
            yield from (member.value for member in info.cls)
        case msgspec.inspect.UnionType():
            for one in info.types:
                yield from _literals(one)
        case msgspec.inspect.ListType():
            yield from _literals(info.item_type)
        case msgspec.inspect.Metadata():
            yield from _literals(info.type)
