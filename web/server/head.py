"""The head of a request, read by gunicorn's parser and checked more strictly."""

from __future__ import annotations

import re
from typing import Any

from gunicorn.http import errors
from gunicorn.http.body import ChunkedReader
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader

from inferno.errors import InvalidRequest
from web.server.connection import HeadTooLarge

#: A name or an address, and a port; RFC 9110 section 7.2.
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


class NotImplementedCoding(InvalidRequest):
    """The request has a transfer coding that the server does not know."""

    status = 501
    code = "not_implemented"
    title = "Not implemented"


class UnknownVersion(InvalidRequest):
    """The request has a version of HTTP that the server does not speak."""

    status = 505
    code = "http_version_not_supported"
    title = "HTTP version not supported"


class ExpectationFailed(InvalidRequest):
    """The request expects what the server does not do."""

    status = 417
    code = "expectation_failed"
    title = "Expectation failed"


#: What gunicorn's errors mean to a client; all others mean a malformed head.
_ERRORS: dict[type[Exception], type[InvalidRequest]] = {
    errors.LimitRequestLine: HeadTooLarge,
    errors.LimitRequestHeaders: HeadTooLarge,
    errors.UnsupportedTransferCoding: NotImplementedCoding,
    errors.InvalidHTTPVersion: UnknownVersion,
    errors.ExpectationFailed: ExpectationFailed,
}


def parse(cfg: Any, text: bytes, peer: Any) -> Request:
    """Return the request that a head announces; its body is not read.

    Args:
      cfg: gunicorn's configuration.
      text: from the request line to the empty line.
      peer: the client's address.
    Raises:
      InvalidRequest: the head is malformed; the connection must be closed.
    """
    # Servers that disagree about where a line ends disagree about where a request ends.
    if text.count(b"\n") != text.count(b"\r\n"):
        raise InvalidRequest("expected lines that end with CR LF, got a bare line feed")
    if b"\n " in text or b"\n\t" in text:
        raise InvalidRequest("expected headers of one line each, got one that is folded")
    try:
        request = Request(cfg, IterUnreader([text]), peer)
    except (errors.ParseException, errors.NoMoreData) as exc:
        kind = next((ours for theirs, ours in _ERRORS.items() if isinstance(exc, theirs)), None)
        raise (kind or InvalidRequest)(f"the request's head is malformed: {exc}") from None
    _check_host(request)
    _check_coding(request)
    return request


def body_size(request: Request) -> int | None:
    """Return the bytes of a request's body; None if it comes in chunks."""
    reader = request.body.reader
    return None if isinstance(reader, ChunkedReader) else reader.length


def _check_host(request: Request) -> None:
    host = next((value for name, value in request.headers if name == "HOST"), None)
    if host is None and request.version < (1, 1):
        return
    if host is None or not _HOST.fullmatch(host):
        got = "none" if host is None else repr(host)[:80]
        raise InvalidRequest(f"expected one Host header with a name and a port, got {got}")
    scheme, separator, rest = request.uri.partition("://")
    if separator and "/" not in scheme and re.split("[/?#]", rest)[0].lower() != host.lower():
        raise InvalidRequest("expected the same host in the request line and in Host")


def _check_coding(request: Request) -> None:
    codings = [value for name, value in request.headers if name == "TRANSFER-ENCODING"]
    if codings and [coding.lower() for coding in codings] != ["chunked"]:
        raise NotImplementedCoding(
            f"expected Transfer-Encoding: chunked, got {', '.join(codings)!r:.80}"
        )
