"""Compressed bodies of the Open Inference Protocol: requests in gzip or deflate, and answers."""

from __future__ import annotations

import gzip
import zlib

from flask import Response, request

from inferno.errors import InvalidRequest, PayloadTooLarge
from web.calls import turns

#: Shorter answers are not compressed, in bytes.
COMPRESSED_BYTES = 1024
#: Parameters of zlib for the formats that HTTP calls gzip and deflate.
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
#: Compression level: speed matters more than size.
_FAST = 1


def read_body(limit: int) -> bytes:
    """Return the body of the request, decompressed.

    Args:
      limit: maximum size of the decompressed body, in bytes.
    Raises:
      PayloadTooLarge: the body is larger.
      InvalidRequest: the encoding is unknown, or the body does not match it.
    """
    # The content type does not matter: clients do not set it.
    body = request.get_data(cache=False)
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    window = _WINDOWS.get(encoding)
    if window is None:
        raise InvalidRequest(f"Content-Encoding: expected gzip or deflate, got {encoding!r:.40}")
    unpacker = zlib.decompressobj(window)
    try:
        unpacked = unpacker.decompress(body, limit + 1)
    except zlib.error as exc:
        raise InvalidRequest(f"the body is not valid {encoding}: {exc}") from None
    if len(unpacked) > limit:
        raise PayloadTooLarge(f"expected a body of at most {limit} bytes, decompressed")
    if not unpacker.eof:
        raise InvalidRequest(f"the body is not valid {encoding}: it ends too early")
    if unpacker.unused_data:
        raise InvalidRequest(f"the body is not valid {encoding}: more bytes follow its end")
    if len(body) < turns.LARGE_BYTES:
        turns.give_way(len(unpacked))
    return unpacked


def set_body(response: Response, body: bytes) -> None:
    """Set the body of an answer, compressed if it is large and the client accepts that."""
    if len(body) >= COMPRESSED_BYTES:
        accepted = request.accept_encodings
        encoding = max(_WINDOWS, key=lambda name: accepted[name])
        if accepted[encoding]:
            body = (gzip if encoding == "gzip" else zlib).compress(body, _FAST)
            response.headers["Content-Encoding"] = encoding
        response.headers["Vary"] = "Accept-Encoding"
    response.set_data(body)
