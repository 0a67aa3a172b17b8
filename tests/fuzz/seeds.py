"""Valid requests of every route, made from the OpenAPI document; mutations begin with them."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

#: The model whose lane is paused, purged and unloaded; nobody waits for its tasks.
CONTROLLED = "mock"
#: The routes of one model each; those of one model are enough.
OTHER_MODEL = re.compile(r"/v1/models/(?!echo)\w+:predict")
#: An image of one pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)
UNKNOWN_TASK = "0d4c0000-0000-4000-8000-000000000000"

#: A valid body for each end of a path.
BODIES: dict[str, Any] = {
    "/v2/models/{}/infer": {
        "inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}]
    },
    "/generate": {"text_input": "a", "parameters": {"priority": 1}},
    "/generate_stream": {"text_input": "a"},
    "/infer": {"model": "echo", "inputs": {"text": ["a", "b"]}, "priority": 1, "timeout_ms": 2000},
    ":predict": {"inputs": {"x": {"dtype": "float32", "shape": [1, 2], "data": [[1, 2.5]]}}},
    "/repository/index": {"ready": True},
    "/load": {"parameters": {"config": '{"version_policy": {"specific": {"versions": [1]}}}'}},
    "/unload": {"parameters": {"unload_dependents": False}},
    ":load": {"name": CONTROLLED, "version": 1, "activate": False},
    ":unload": {"name": CONTROLLED, "version": 7},
    "/active": {"weights": {"1": 1}},
}

#: A valid value for each parameter in a query.
QUERY = {
    "wait": "0.1",
    "limit": "5",
    "cursor": "0",
    "status": "queued,running",
    "model": "echo",
    "confirm": "0",
}


@dataclass(frozen=True)
class Request:
    """One HTTP request, not yet bytes."""

    method: str
    target: bytes
    #: Names and values; `Host` and `Content-Length` are added.
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    version: bytes = b"HTTP/1.1"

    def head(self, host: bytes, *lines: bytes) -> bytes:
        """Return the head, from the request line to the empty line.

        Args:
          host: value of the Host header.
          lines: further header lines, without their ends.
        """
        named = [b"%b: %b" % header for header in self.headers]
        start = b"%b %b %b" % (self.method.encode("latin-1"), self.target, self.version)
        return b"\r\n".join([start, b"Host: " + host, *named, *lines, b"", b""])

    def encoded(self, host: bytes) -> bytes:
        """Return the whole request."""
        length = [b"Content-Length: %d" % len(self.body)] if self.body else []
        return self.head(host, *length) + self.body

    def chunked(self, host: bytes, stream: bytes) -> bytes:
        """Return the request with another body, which is chunked already."""
        return self.head(host, b"Transfer-Encoding: chunked") + stream

    def with_header(self, name: bytes, value: bytes) -> Request:
        """Return the request with one more header."""
        return replace(self, headers=(*self.headers, (name, value)))


def requests(document: dict[str, Any]) -> list[Request]:
    """Return a valid request for each operation of an OpenAPI document, and a few more."""
    found = [
        _request(method.upper(), path, operation)
        for path, operations in document["paths"].items()
        if not OTHER_MODEL.match(path)
        for method, operation in operations.items()
        if method in ("get", "post", "put", "delete")
    ]
    image = ((b"Content-Type", b"image/png"),)
    return [
        *found,
        Request("GET", b"/"),
        Request("GET", b"/docs"),
        Request("POST", b"/v1/models/digits:predict", image, PNG),
        Request("POST", b"/infer?model=digits&input=image", image, PNG),
        Request("POST", b"/v1/models/echo:predict", JSON, b'{"instances": [{"text": "a"}]}'),
    ]


JSON = ((b"Content-Type", b"application/json"),)


def _request(method: str, path: str, operation: dict[str, Any]) -> Request:
    controls = re.search(r"lanes|:load|:unload|/repository/|/active|/cache", path)
    model = CONTROLLED if controls else "echo"
    values = {"model": model, "name": model, "version": "1", "task_id": UNKNOWN_TASK}
    target = re.sub(r"{(\w+)}", lambda match: quote(values[match[1]]), path)
    query = [
        f"{parameter['name']}={QUERY[parameter['name']]}"
        for parameter in operation.get("parameters", [])
        if parameter.get("in") == "query" and parameter["name"] in QUERY and method != "POST"
    ]
    if query:
        target += "?" + "&".join(query)
    if "requestBody" not in operation:
        return Request(method, target.encode())
    return Request(method, target.encode(), JSON, json.dumps(body_of(path)).encode())


def body_of(path: str) -> Any:
    """Return a valid body for a route.

    Raises:
      KeyError: the route takes a body, and `BODIES` has none for it.
    """
    if re.match(r"/v2/models/.*/infer$", path):
        return BODIES["/v2/models/{}/infer"]
    for end, body in BODIES.items():
        if path.endswith(end):
            return body
    raise KeyError(path)
