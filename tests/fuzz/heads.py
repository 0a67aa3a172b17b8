"""Heads that are wrong in one way: request lines, header lines, lengths and codings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from tests.fuzz.case import Case, Ending
from tests.fuzz.seeds import Request

#: Asked for behind a broken request; it is answered only if bytes of that request became a request.
MARKER = b"GET /v1/models/smuggled HTTP/1.1\r\nHost: %b\r\n\r\n"

METHODS = [
    "HEAD", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PRI", "get", "GETS", "G\x00T", "G\tT", "",
    "\xc4", "A" * 5000, "POST\x1b[31m", "G(T", "M-SEARCH",
]  # fmt: skip

TARGETS = [
    b"*", b"", b"http://127.0.0.1/health/live", b"http://other.example/health", b"//health/live",
    b"127.0.0.1:80", b"/health/live#fragment", b"/health/../health/live",
    b"/%2e%2e/%2e%2e/etc/passwd", b"/health%00", b"/%zz", b"/%", b"/tasks/%ff%fe",
    b"/tasks/\xff\xfe", b"/tasks/\xc3\xa4", b"/tasks/%1b%5b31mred",
    b"/tasks/a%0d%0aX-Injected:%201", b"/tasks/%0aforged%20log%20line", b"/tasks/" + b"a" * 3000,
    b"/" + b"a" * 9000, b"/" + b"a/" * 2000, b"/" + b"a" * 70_000,
    b"/v1/models/%F0%9F%98%80:predict", b"/v1/models/..:predict", b"/v1/models/echo%2fx:predict",
    b"/lanes/" + b"%25" * 500, b"/dead/\x7f", b"/v2/models/echo/versions/-1", b"/health/live?",
    b"/v2/models/echo/versions/99999999999999999999", b"/v2/models/echo/versions/%D9%A3/ready",
    b"\\health\\live", b"/health\\live", b"/ws", b"/ws/x", b"/health/live;a=b",
]  # fmt: skip

QUERIES = [
    b"limit=\xff", b"limit=%ff", b"limit=-1", b"limit=1e3", b"limit=%D9%A3",
    b"limit=" + b"9" * 400, b"limit=" + b"9" * 5000, b"cursor=\xff\xfe", b"cursor=-1",
    b"cursor=nan", b"cursor=" + b"z" * 3000, b"wait=nan", b"wait=-inf", b"wait=-0.1", b"wait=%00",
    b"wait=0x1", b"wait=1_0", b"wait=%D9%A3", b"status=\xff", b"status=,,,,",
    b"status=" + b"queued," * 900, b"model=%00", b"model=\xff", b"model=" + b"a" * 3000,
    b"confirm=-1", b"confirm=%D9%A3", b"confirm=9" + b"9" * 4400, b"version=-1", b"version=%ff",
    b"=", b"&&&", b"a" + b"&a" * 3000, b"limit=1&limit=2", b"%", b"priority=%ff", b"shape=1,,2",
    b"shape=" + b"0," * 500, b"outputs=\xff", b"input=%00", b"\xff=\xff",
    b"timeout_ms=" + b"9" * 30, b"codec=%1b%5b2J",
]  # fmt: skip

VERSIONS = [
    b"HTTP/0.9", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/3.0", b"HTTP/1.1x", b"http/1.1",
    b"HTTP/", b"HTTP/11", b"HTTP/1.1 HTTP/1.1", b"HTTP/\xb2.1", b"", b"ICY/1.0",
    b"HTTP/1.999999999999999999999",
]  # fmt: skip

#: Header lines after which the rest of the head cannot be trusted.
BROKEN_LINES = {
    "bare LF": b"X-A: b\nX-C: d",
    "bare CR": b"X-A: b\rX-C: d",
    "obs-fold": b"X-A: b\r\n folded",
    "obs-fold with a tab": b"X-A: b\r\n\tfolded",
    "space before the colon": b"X-A : b",
    "tab before the colon": b"X-A\t: b",
    "no colon": b"nonsense",
    "empty name": b": b",
    "space in a name": b"X A: b",
    "control character in a name": b"X-\x01A: b",
    "byte over 127 in a name": b"X-\xe4: b",
    "NUL in a value": b"X-A: b\x00c",
    "second Host": b"Host: other.example",
    "Transfer-Encoding with a space": b"Transfer-Encoding : chunked",
    "negative length": b"Content-Length: -1",
    "signed length": b"Content-Length: +0",
    "hexadecimal length": b"Content-Length: 0x0",
    "length with an underscore": b"Content-Length: 1_0",
    "length of superscripts": b"Content-Length: \xb2",
    "empty length": b"Content-Length: ",
    "list of lengths": b"Content-Length: 0, 1",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 5",
    "endless length": b"Content-Length: " + b"9" * 5000,
    "length and chunked": b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    "chunked twice": b"Transfer-Encoding: chunked, chunked",
    "chunked in two lines": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "chunked not last": b"Transfer-Encoding: chunked, gzip",
    "unknown coding": b"Transfer-Encoding: xchunked",
    "quoted coding": b'Transfer-Encoding: "chunked"',
    "coding with a parameter": b"Transfer-Encoding: chunked;q=1",
    "coding with a vertical tab": b"Transfer-Encoding: \x0bchunked",
    "empty coding": b"Transfer-Encoding: ",
}  # fmt: skip

#: Hosts that are not hosts.
HOSTS = [
    b"a b", b"a/b", b"a@b", b"a?b", b"a#b", b"[::1", b"a:b", b"a:99999999", b"\xff", b"a\x00b",
    b"a,b", b"<a>",
]  # fmt: skip

#: Headers that are odd; whatever they mean, the answer is an orderly one.
ODD_HEADERS = [
    (b"Expect", b"100-continue"), (b"Expect", b"nonsense"), (b"Expect", b"100-continue, 200-ok"),
    (b"Upgrade", b"h2c"), (b"Upgrade", b"websocket"), (b"Upgrade", b"\xff"), (b"Upgrade", b",,,"),
    (b"Connection", b"upgrade"), (b"Connection", b"\xff"), (b"Connection", b"close, keep-alive"),
    (b"Connection", b"," * 2000), (b"Connection", b"Content-Length"), (b"Connection", b"Host"),
    (b"Content-Type", b"multipart/form-data"),
    (b"Content-Type", b"multipart/form-data; boundary=\xff"),
    (b"Content-Type", b"application/x-www-form-urlencoded"), (b"Content-Type", b"text/plain"),
    (b"Content-Type", b"application/json; charset=utf-16"), (b"Content-Type", b"\xff/\xfe"),
    (b"Content-Type", b"image/png"), (b"Content-Type", b"audio/" + b"x" * 2000),
    (b"Content-Type", b"application/octet-stream"), (b"Content-Type", b"image/"),
    (b"Content-Encoding", b"gzip"), (b"Content-Encoding", b"br"),
    (b"Content-Encoding", b"deflate"), (b"Content-Encoding", b"gzip, gzip, gzip"),
    (b"Content-Encoding", b"\xff"), (b"Accept", b"\xff"), (b"Accept", b"text/html;q=nan"),
    (b"Accept", b"*/*;" * 500), (b"Accept-Encoding", b"gzip;q=\xff"),
    (b"Accept-Encoding", b"identity;q=0, *;q=0"), (b"Accept-Language", b"-" * 3000),
    (b"Range", b"bytes=0-0,1-1"), (b"Range", b"bytes=-" + b"9" * 99),
    (b"If-None-Match", b"W/\xff"), (b"If-Modified-Since", b"nonsense"), (b"If-Match", b"*"),
    (b"Idempotency-Key", b'"open'), (b"Idempotency-Key", b"a\xffb"),
    (b"Idempotency-Key", b"a" * 300), (b"Idempotency-Key", b""), (b"Idempotency-Key", b'"\\"'),
    (b"Idempotency-Key", b"(1 2)"), (b"Prefer", b"wait=-1"), (b"Prefer", b"wait=nan"),
    (b"Prefer", b"wait=%ff"), (b"Prefer", b"wait=\xb2"), (b"Prefer", b"wait=0, wait=1"),
    (b"Prefer", b";;;=,=,"), (b"Prefer", b"respond-async=\xff"), (b"Prefer", b'wait="0'),
    (b"Cache-Control", b"no-cache=\xff, max-age=-1"), (b"Cache-Control", b"=,=\xff"),
    (b"Inferno-Version", b"-1"), (b"Inferno-Version", b"\xb2"), (b"Inferno-Version", b"9" * 400),
    (b"Inferno-Version", b"1e3"), (b"Inferno-Version", b""),
    (b"Inferno-Sticky-Key", b"\xff" * 3000), (b"Inference-Header-Content-Length", b"-1"),
    (b"Inference-Header-Content-Length", b"9" * 400),
    (b"Inference-Header-Content-Length", b"\xb2"), (b"Inference-Header-Content-Length", b"0x1"),
    (b"Authorization", b"Basic \xff"), (b"Authorization", b"Bearer"), (b"Cookie", b"=;=;\xff"),
    (b"Origin", b"\xff"), (b"Origin", b"null"), (b"Origin", b"https://evil.example"),
    (b"Referer", b"\x1b[2J"), (b"X-HTTP-Method-Override", b"DELETE"),
    (b"X-Forwarded-For", b"\xff"), (b"Forwarded", b"for=\xff;;"), (b"X_Under", b"a"),
    (b"Content_Length", b"3"), (b"X-Long", b"a" * 9000), (b"X-Longer", b"a" * 70_000),
    (b"Trailer", b"Content-Length"), (b"TE", b"trailers, \xff"), (b"Max-Forwards", b"\xb2"),
    (b"Sec-WebSocket-Key", b"\xff"), (b"Sec-WebSocket-Version", b"99"),
    (b"HTTP2-Settings", b"\xff"), (b"Script-Name", b"/v1"), (b"Proxy", b"http://evil.example"),
    (b"Keep-Alive", b"timeout=\xff"),
]  # fmt: skip


def request_line(rng: Random, seed: Request, host: bytes) -> Case:
    """Change the method, the target, its query or the version."""
    part = rng.choice(["method", "target", "query", "version"])
    if part == "method":
        seed = replace(seed, method=rng.choice(METHODS))
    elif part == "target":
        seed = replace(seed, target=rng.choice(TARGETS))
    elif part == "query":
        path, _, _ = seed.target.partition(b"?")
        seed = replace(seed, target=path + b"?" + rng.choice(QUERIES))
    else:
        seed = replace(seed, version=rng.choice(VERSIONS))
    return Case(f"request line: {part}", (seed.encoded(host),), (seed.method,))


def header_line(rng: Random, seed: Request, host: bytes) -> Case:
    """Add a header line that breaks the head, and a marker behind the request."""
    name, line = rng.choice(list(BROKEN_LINES.items()))
    lines = [line, b"X-After: a"]
    rng.shuffle(lines)
    wire = seed.head(host, *lines) + MARKER % host
    ending = Ending.WAIT
    return Case(f"header: {name}", (wire,), (seed.method,), ending, closes=True, refused=True)


def host_header(rng: Random, seed: Request, host: bytes) -> Case:
    """Leave the Host out, or name none that can exist."""
    wire = seed.encoded(host)
    if rng.random() < 0.3:
        name, wire = "no Host", wire.replace(b"Host: %b\r\n" % host, b"", 1)
    else:
        name = "invalid Host"
        wire = wire.replace(b"Host: " + host, b"Host: " + rng.choice(HOSTS), 1)
    wire += MARKER % host
    return Case(f"header: {name}", (wire,), (seed.method,), Ending.WAIT, closes=True, refused=True)


def odd_headers(rng: Random, seed: Request, host: bytes) -> Case:
    """Add one to three headers with odd values."""
    for name, value in rng.sample(ODD_HEADERS, rng.randint(1, 3)):
        seed = seed.with_header(name, value)
    return Case("odd headers", (seed.encoded(host),), (seed.method,))


def many_headers(rng: Random, seed: Request, host: bytes) -> Case:
    """Add more headers, or longer ones, than a server takes."""
    count, size = rng.choice([(120, 1), (2000, 1), (90, 900), (1, 200_000)])
    for number in range(count):
        seed = seed.with_header(b"X-%d" % number, b"a" * size)
    return Case("many headers", (seed.encoded(host),), (seed.method,))


MUTATIONS: list[Callable[[Random, Request, bytes], Case]] = [
    request_line, request_line, header_line, header_line, host_header, odd_headers, odd_headers,
    many_headers,
]  # fmt: skip
