"""Idempotency-Key: a request that is sent again is done once.

See draft-ietf-httpapi-idempotency-key-header. A key belongs to the first request that was accepted
with it; one that was refused leaves it free.
"""

from __future__ import annotations

import hashlib
import re

from flask import request

from inferno.errors import InvalidField, InvalidRequest
from tasks.state.transitions import Idempotency
from web.openapi.document import Header

HEADER = "Idempotency-Key"
#: Set on the answer to a request that was accepted before.
REPLAYED_HEADER = "Idempotency-Replayed"

KEY = Header(
    HEADER,
    "Has the request done once, however often it is sent.",
    example='"8e03978e-40d5-43dd"',
)
REPLAYED = Header(REPLAYED_HEADER, "`true` if the request was accepted before.", example="true")

#: Most characters of a key.
MAX_LENGTH = 255

#: Whose keys they are: the platform does not tell its clients apart.
_SCOPE = "everyone"

#: A string of RFC 8941, and what clients send that leave out its quotes.
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])+)"')
_BARE = re.compile(r"[!#-+\--\[\]-~]+")
_ESCAPED = re.compile(r"\\(.)")


def from_header(family: str, body: bytes) -> Idempotency | None:
    """Return the key of the current HTTP request, or None when it has none.

    Args:
      family: the route, the same under each prefix, with what of its path is variable.
      body: of the request.
    Raises:
      InvalidRequest: the header is malformed.
    """
    value = request.headers.get(HEADER)
    if value is None:
        return None
    return _identify(parse(value), f"{request.method} {family}", body)


def from_field(value: object, family: str, body: bytes) -> Idempotency | None:
    """Return the key that a message names, or None when it is null.

    Args:
      value: as the client gave it.
      family: what kind of message it is.
      body: what else the message says.
    Raises:
      InvalidField: it is no key.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LENGTH:
        raise InvalidField(f"expected text of 1 to {MAX_LENGTH} characters", "idempotency_key")
    return _identify(value, family, body)


def parse(value: str) -> str:
    """Return the key in a header's value, without its quotes.

    Raises:
      InvalidRequest: it is malformed.
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
    # A zero byte is in none of the first parts, so that no two pairs look the same.
    return hashlib.sha256(first + b"\0" + second).hexdigest()
