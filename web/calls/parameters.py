"""Reads the parameters of URLs into structs, whose types check them."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import msgspec
from flask import Flask, request

from inferno.errors import InvalidRequest
from inferno.protocol.decoding import explain

T = TypeVar("T")


def register(app: Flask) -> None:
    """Refuse URLs whose parameters cannot be read, before every view of an app."""

    @app.before_request
    def check() -> None:
        try:
            request.query_string.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(
                "expected a query in UTF-8, got raw bytes; encode them with %"
            ) from None


def read(kind: type[T]) -> T:
    """Return the parameters of the current HTTP request; unknown parameters are ignored.

    A list may be given as one parameter with commas, as several parameters, or both.

    Args:
      kind: struct that names the parameters and their types.
    Raises:
      InvalidRequest: a parameter does not match its type; names the parameter.
    """
    lists = _lists(kind)  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, values in request.args.lists():
        if name in lists:
            given[name] = [item for value in values for item in value.split(",")]
        else:
            given[name] = values[0]
    try:
        parameters = msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as exc:
        wrong = explain(exc, kind)
        raise InvalidRequest(wrong.detail, wrong.field and wrong.field.partition("[")[0]) from None
    for name in given:
        # msgspec reads the text "null" as no number.
        if getattr(parameters, name, name) is None:
            raise InvalidRequest(f"expected a value, got {given[name]!r}", name)
    return parameters


@functools.cache
def _lists(kind: type) -> frozenset[str]:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    types = {field.encode_name: _plain(field.type) for field in info.fields}
    return frozenset(n for n, one in types.items() if isinstance(one, msgspec.inspect.ListType))


def _plain(info: msgspec.inspect.Type) -> msgspec.inspect.Type:
    return _plain(info.type) if isinstance(info, msgspec.inspect.Metadata) else info
