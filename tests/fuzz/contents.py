"""Bodies whose framing is right and whose content is not: JSON, images and binary tensors."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from tests.fuzz.case import Case, Ending
from tests.fuzz.seeds import PNG, Request

#: Stands in a document for raw JSON that Python would not write.
RAW = "\x01raw\x01"

#: Raw JSON that takes the place of a value.
RAW_VALUES = [
    b"NaN", b"-Infinity", b"1e999", b"-0", b"01", b"1.", b".5", b"9" * 400, b"-" + b"9" * 5000,
    b"1e-9999", b"9223372036854775808", b"-9223372036854775809", b'"\\ud800"', b'"\\udc00\\ud800"',
    b'"\\u0000"', b'"\xff"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\n"', b'"\\x41"',
    b"[" * 200 + b"]" * 200, b"[" * 20_000 + b"]" * 20_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b"[" + b"[]," * 20_000 + b"[]]", b"[" + b"{}," * 20_000 + b"{}]",
    b'"' + b"a" * 1_500_000 + b'"', b"[" + b"1," * 100_000 + b"1]", b"tru", b"{,}", b"[,]", b"'a'",
    b"/**/1", b"", b'{"a":1,"a":2}',
]  # fmt: skip

#: Values that take the place of others.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1.5, 1e308, "", "a", "\0",
    "\x1b[31m", "é", "😀", "‮", "a" * 5000, [], {}, [[]], [None], [0] * 33, [-1], [0],
    [2**31, 2**31], [2**62, 4], [0, 2**62], ["a", 1], [[1], [2, 3]], {"": ""},
    {"dtype": "float32", "shape": [0, 2**40], "data": []},
    {"dtype": "float32", "shape": [2**20, 0], "base64": ""},
    {"dtype": "string", "shape": [1], "data": ["a"]},
    {"dtype": "float32", "shape": [1, 2], "base64": "????"}, {"dtype": "object", "data": [1]},
    {"dtype": "float32", "shape": [1] * 99, "data": [1]}, {"b64": "AAAA"}, {"b64": 5},
    "data:image/png;base64,AAAA", "http://127.0.0.1:1/", "http://169.254.169.254/latest",
    "file:///etc/passwd", "echo", "../../etc/passwd", "FP32", "BYTES", "BF16", "int8", "latest",
    ["completed", "start"], ["nothing"], "gopher://[::1", "http://[",
]  # fmt: skip

#: Members that a document may have and the seeds do not.
MEMBERS = [
    "version", "outputs", "priority", "timeout_ms", "codec", "webhook", "webhook_events", "cache",
    "model", "model_name", "model_id", "payload", "input", "instances", "inputs", "id",
    "parameters", "input_type", "binary_data_size", "classification", "sequence_id",
    "shared_memory_region", "__proto__", "", "a" * 300, "\ud83d",
]  # fmt: skip


def json_tree(rng: Random, seed: Request, host: bytes) -> Case:
    """Change one to three places of a JSON body."""
    document = _loaded(seed)
    kinds = [_change(rng, document) for _ in range(rng.randint(1, 3))]
    body = json.dumps(document).encode()
    raw = json.dumps(RAW).encode()
    while raw in body:
        body = body.replace(raw, rng.choice(RAW_VALUES), 1)
    return _case(f"JSON: {kinds[0]}", seed, body, host)


def json_text(rng: Random, seed: Request, host: bytes) -> Case:
    """Change the text of a JSON body as a whole."""
    body = seed.body
    kind, body = rng.choice(
        [
            ("byte-order mark", b"\xef\xbb\xbf" + body),
            ("UTF-16", body.decode("latin-1").encode("utf-16")),
            ("UTF-32", body.decode("latin-1").encode("utf-32")),
            ("more behind it", body + b"more"),
            ("twice", body + body),
            ("cut", body[: rng.randrange(max(1, len(body)))]),
            ("white space", b" \t\r\n" * 50_000),
            ("NUL behind it", body + b"\0" * 10),
            ("not UTF-8", body.replace(b'"', b'"\xfe', 1)),
            ("value only", rng.choice(RAW_VALUES)),
            ("every member twice", body[:-1] + b"," + body[1:]),
            ("empty", b""),
            ("many members", b"{" + b",".join(b'"a%d":1' % n for n in range(50_000)) + b"}"),
        ]
    )
    return _case(f"JSON: {kind}", seed, body, host)


def image(rng: Random, seed: Request, host: bytes) -> Case:
    """Send an image that is damaged, or whose size is a lie, as a raw body."""
    body = bytearray(PNG)
    if rng.random() < 0.5:
        struct.pack_into(">II", body, 16, *rng.choice([(2**31 - 1, 1), (0, 0), (40_000, 40_000)]))
    else:
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    target = rng.choice([b"/v1/models/digits:predict", b"/infer?model=digits"])
    headers = ((b"Content-Type", rng.choice([b"image/png", b"image/gif", b"audio/wav"])),)
    request = Request("POST", target, headers, bytes(body[: rng.choice([8, 30, len(body)])]))
    return Case("image", (request.encoded(host),), ("POST",), Ending.WAIT)


def binary_tensors(rng: Random, seed: Request, host: bytes) -> Case:
    """Send an inference with binary tensors of which one number is a lie."""
    element = struct.pack("<I", 1) + b"a"
    tensor: dict[str, Any] = {"name": "text", "datatype": "BYTES", "shape": [2]}
    data = element * 2
    if rng.random() < 0.5:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2]}
        data = struct.pack("<2f", 1, 2)
    size: Any = len(data)
    length: Any = None
    lie = rng.choice(["none", "size", "element", "shape", "datatype", "header", "data"])
    if lie == "size":
        size = rng.choice([0, 1, size - 1, size + 1, -1, 2**31, 2**63, "8", 8.5, None, [8]])
    elif lie == "element":
        data = struct.pack("<I", rng.choice([0, 2, 2**31, 2**32 - 1])) + data[4:]
    elif lie == "shape":
        tensor["shape"] = rng.choice(
            [[], [0], [-1], [2**31], [2**40, 0], [0, 2**62], [1] * 50, [2, 2], "2", [2.0], [None]]
        )
    elif lie == "datatype":
        tensor["datatype"] = rng.choice(["FP64", "BF16", "INT8", "UINT64", "BOOL", "", 5, "OBJECT"])
    elif lie == "header":
        length = rng.choice([b"0", b"1", b"-1", b"99999", b"9" * 400, b"1.5", b"\xb2", b"", b" 5"])
    elif lie == "data":
        data = data[: rng.randrange(len(data))] + b"\xff" * rng.choice([0, 1, 100_000])
    tensor["parameters"] = {"binary_data_size": size}
    outputs = [{"name": tensor["name"], "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    headers = ((b"Inference-Header-Content-Length", length or b"%d" % len(head)),)
    request = Request("POST", b"/v2/models/echo/infer", headers, head + data)
    return Case(f"binary tensor: {lie}", (request.encoded(host),), ("POST",), Ending.WAIT)


def _case(kind: str, seed: Request, body: bytes, host: bytes) -> Case:
    return Case(kind, (replace(seed, body=body).encoded(host),), (seed.method,), Ending.WAIT)


def _loaded(seed: Request) -> Any:
    try:
        return json.loads(seed.body)
    except ValueError:
        return {"inputs": {"text": ["a"]}}


def _change(rng: Random, document: Any) -> str:
    """Change one place of a document; return what was done.

    Values are copied: a later change may change what an earlier one put in.
    """
    places = list(_places(document))
    parent, key = rng.choice(places) if places else (document, "")
    kind = rng.choice(["value", "raw", "removed", "renamed", "nested", "member"])
    if kind == "member" and isinstance(parent, dict):
        parent[rng.choice(MEMBERS)] = copy.deepcopy(rng.choice([RAW, *VALUES]))
    elif not places:
        return "nothing"
    elif kind == "raw":
        parent[key] = RAW
    elif kind == "removed":
        del parent[key]
    elif kind == "renamed" and isinstance(parent, dict):
        parent[rng.choice(MEMBERS)] = parent.pop(key)
    elif kind == "nested":
        for _ in range(rng.choice([1, 2, 30])):
            parent[key] = [parent[key]]
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return kind


def _places(node: Any) -> Any:
    """Yield each member of each object, and each element of each list."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield node, key
            yield from _places(value)
    elif isinstance(node, list):
        for index, value in enumerate(node[:20]):
            yield node, index
            yield from _places(value)


MUTATIONS: list[Callable[[Random, Request, bytes], Case]] = [
    json_tree, json_tree, json_tree, json_text, image, binary_tensors, binary_tensors,
]  # fmt: skip
