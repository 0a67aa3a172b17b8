"""Decoding of request bodies and URL parameters, with errors that name the field.

Step *submit*: msgspec decodes and checks; its errors are reworded for clients here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from inferno.errors import InvalidField, InvalidRequest

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


def decode(body: bytes, kind: type[_T]) -> _T:
    """Read a body that is a JSON object.

    Args:
      body: the bytes of the body.
      kind: the struct to return.
    Raises:
      InvalidRequest: the body does not decode to the struct; names the field.
    """
    if not body:
        raise InvalidRequest("expected a JSON object, got an empty body")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise explain(exc, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"the body is not valid JSON: {exc}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


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
    return InvalidRequest(text) if field is None else InvalidField(text, field)


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
