"""Idempotency-Key: a request that is sent several times is done once.

See draft-ietf-httpapi-idempotency-key-header. A key belongs to the first accepted request that
carried it; a refused request leaves its key free.
"""

from __future__ import annotations

import hashlib
import re

from flask import request

from inferno.errors import InvalidField, InvalidRequest
from tasks.state.transitions import Idempotency
from web.openapi.describe import Header

HEADER = "Idempotency-Key"
#: Header of the answer to a request that was accepted before.
REPLAYED_HEADER = "Idempotency-Replayed"

KEY = Header(
    HEADER,
    "The request is done once, however often it is sent with this key.",
    example='"8e03978e-40d5-43dd"',
)
REPLAYED = Header(REPLAYED_HEADER, "`true` if the request was accepted before.", example="true")

#: Maximum length of a key, in characters.
MAX_LENGTH = 255

#: Owner of all keys: the platform does not distinguish its clients.
_SCOPE = "everyone"

#: A string of RFC 8941, and a string without quotes, as many clients send it.
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])+)"')
_BARE = re.compile(r"[!#-+\--\[\]-~]+")
_ESCAPED = re.compile(r"\\(.)")


def from_header(family: str, body: bytes) -> Idempotency | None:
    """Return the key of the current HTTP request, or None if it has none.

    Args:
      family: the route without its prefix, and the variable parts of its path.
      body: the body of the request.
    Raises:
      InvalidRequest: the header is malformed.
    """
    value = request.headers.get(HEADER)
    if value is None:
        return None
    return _identify(parse(value), f"{request.method} {family}", body)


def from_field(value: object, family: str, body: bytes) -> Idempotency | None:
    """Return the key of a WebSocket message, or None if it has none.

    Args:
      value: the key as the client sent it.
      family: type of the message.
      body: the rest of the message.
    Raises:
      InvalidField: the value is not a key.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LENGTH:
        raise InvalidField(f"expected text of 1 to {MAX_LENGTH} characters", "idempotency_key")
    return _identify(value, family, body)


def parse(value: str) -> str:
    """Return the key in the value of a header, without quotes.

    Raises:
      InvalidRequest: the value is malformed.
    """
    value = value.strip(" ")
    if quoted := _QUOTED.fullmatch(value):
        key = _ESCAPED.sub(r"\1", quoted[1])
    elif _BARE.fullmatch(value):
        key = value
    else:
        raise InvalidRequest(
            'expected one key in quotes, such as "8e03978e-40d5-43dd", of printable ASCII', HEADER
        )
    if len(key) > MAX_LENGTH:
        raise InvalidRequest(
            f"expected a key of at most {MAX_LENGTH} characters, got {len(key)}", HEADER
        )
    return key


def _identify(key: str, family: str, body: bytes) -> Idempotency:
    return Idempotency(
        digest=_digest(_SCOPE.encode(), key.encode("utf-8", "surrogatepass")),
        fingerprint=_digest(family.encode(), body),
    )


def _digest(first: bytes, second: bytes) -> str:
    # No first part contains a zero byte, so no two pairs give the same text.
    return hashlib.sha256(first + b"\0" + second).hexdigest()
