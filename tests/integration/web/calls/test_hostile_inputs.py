"""Hostile inputs over every way in: each is refused with the same error before it is queued."""

from __future__ import annotations

import base64
import gzip
import json
import queue
import time
import tracemalloc
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flask.testing import FlaskClient

from inferno.settings import LimitSettings, Settings
from tests.pictures import png_chunk, png_header, white_png
from web.sockets.conversation import Conversation
from web.sockets.peer import Peer

LIMITS = {"max_elements": 1000, "max_items": 20, "max_rows": 30, "max_total_pixels": 60_000_000}

#: Sends inputs by name to a model, and returns the problem.
Send = Callable[[FlaskClient, str, Any], dict[str, Any]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    limits = LimitSettings.model_validate(LIMITS)
    return settings.model_copy(update={"limits": limits})


def predict(client: FlaskClient, model: str, inputs: Any) -> dict[str, Any]:
    return _problem(client.post(f"/models/{model}:predict", data=_json({"inputs": inputs})))


def submit(client: FlaskClient, model: str, inputs: Any) -> dict[str, Any]:
    return _problem(client.post("/infer", data=_json({"model": model, "inputs": inputs})))


def instances(client: FlaskClient, model: str, inputs: Any) -> dict[str, Any]:
    """Send the value of each input as the input of one row."""
    return _problem(client.post(f"/models/{model}:predict", data=_json({"instances": [inputs]})))


def message(client: FlaskClient, model: str, inputs: Any) -> dict[str, Any]:
    """Submit in a conversation, as sockets have it."""
    said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    gateway = client.application.extensions["inferno"].gateway
    peer = SimpleNamespace(put=said.put, keep=lambda: 0, release=lambda size: None)
    conversation = Conversation(gateway, cast(Peer, peer))
    conversation.handle(_json({"type": "submit", "model": model, "inputs": inputs}))
    answer: dict[str, Any] = json.loads(said.get(timeout=10))
    assert answer["type"] == "error"
    problem: dict[str, Any] = answer["data"]
    return problem


def _json(document: Any) -> bytes:
    """Encode as JSON; `Literal` values stay as they are."""
    texts: list[str] = []

    def default(value: Any) -> str:
        texts.append(value.text)
        return f"\0{len(texts) - 1}\0"

    encoded = json.dumps(document, default=default)
    for n, text in enumerate(texts):
        encoded = encoded.replace(json.dumps(f"\0{n}\0"), text)
    return encoded.encode()


class Literal:
    """A piece of JSON that Python would not write."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text[:20]


def _problem(response: Any) -> dict[str, Any]:
    problem: dict[str, Any] = response.get_json(force=True)
    assert problem["status"] == response.status_code
    return problem


IN_JSON: list[Send] = [predict, submit, message]
TOO_LARGE = 2**31 - 1
PICTURE = base64.b64encode(white_png(5000, 5000)).decode()
BOMB = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10_000_000), 9))


def picture(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


#: Model, input, value -> status and field; None: whatever.
HOSTILE: list[tuple[str, str, Any, int, str | None]] = [
    # Shapes that numpy cannot represent, without any elements.
    ("tokens", "tokens", {"shape": [0, TOO_LARGE], "data": []}, 422, "inputs.tokens"),
    ("tokens", "tokens", {"shape": [0] + [TOO_LARGE] * 3, "data": []}, 422, "inputs.tokens"),
    ("tokens", "tokens", {"shape": [0, 2**62], "data": []}, 422, "inputs.tokens"),
    ("tokens", "tokens", {"shape": [0] + [TOO_LARGE] * 3, "base64": ""}, 422, "inputs.tokens"),
    ("tokens", "tokens", {"shape": [-1, 2], "data": [1, 2]}, 422, "inputs.tokens"),
    ("tokens", "tokens", {"shape": [1] * 40, "data": [1]}, 422, "inputs.tokens"),
    ("tokens", "tokens", {"shape": {}, "data": [1]}, 422, "inputs.tokens"),
    ("sentiment", "text", {"shape": [0] + [TOO_LARGE] * 3, "data": []}, 422, "inputs.text"),
    # Declared against real size, and budgets.
    ("tokens", "tokens", {"shape": [2, 2], "data": [1]}, 422, "inputs.tokens"),
    ("tokens", "tokens", [[1] * 1001], 422, "inputs.tokens"),
    ("tokens", "tokens", [[1]] * 31, 422, "inputs.tokens"),
    ("sentiment", "text", ["a"] * 31, 422, "inputs.text"),
    ("sentiment", "text", ["a"] * 25, 422, "inputs.text"),
    ("sentiment", "text", "x" * 1_000_001, 422, "inputs.text"),
    # Numbers and texts that JSON or Unicode do not have.
    ("tokens", "mask", Literal("[[NaN]]"), 400, None),
    ("tokens", "mask", Literal("[[1e400]]"), 422, None),
    ("tokens", "mask", Literal(f"[[{'9' * 400}]]"), 422, "inputs.mask"),
    ("tokens", "tokens", Literal(f"[[{'9' * 400}]]"), 422, "inputs.tokens"),
    ("tokens", "tokens", Literal(f"[[{'9' * 5000}]]"), 422, None),
    ("sentiment", "text", Literal('"\\ud800"'), 400, None),
    ("sentiment", "text", Literal("[" * 100 + "]" * 100), 400, None),
    ("sentiment", "text", {"dtype": ["x"], "data": "a"}, 422, "inputs.text"),
    ("sentiment", "text", {"data": "a", "b64": 1}, 422, "inputs.text"),
    # Pictures.
    ("digits", "image", [PICTURE] * 3, 422, "inputs"),
    ("digits", "image", picture(png_header(50_000, 50_000)), 422, "inputs.image"),
    ("digits", "image", picture(png_header(TOO_LARGE, TOO_LARGE)), 422, "inputs.image"),
    ("digits", "image", picture(png_header(0, 0)), 422, "inputs.image"),
    ("digits", "image", picture(png_header(8000, 8000, BOMB)), 422, "inputs.image"),
    ("digits", "image", picture(b"\x89PNG\r\n\x1a\n"), 422, "inputs.image"),
]


@pytest.mark.parametrize("send", IN_JSON)
def test_json_is_refused(client, lane, send):
    for model, name, value, status, field in HOSTILE:
        others = {"tokens": [[1]], "mask": [[1]]} if model == "tokens" else {}
        problem = send(client, model, others | {name: value})
        assert problem["status"] == status, (value, problem)
        assert field is None or problem["field"] == field, (value, problem)
        assert problem["code"] in ("invalid_input", "invalid_field", "invalid_request")
        assert lane(model) == 0


def test_instances_are_refused(client, lane):
    for value, status, field in (
        ("x" * 1_000_001, 422, "inputs.text"),
        ({"shape": [0] + [TOO_LARGE] * 3, "data": []}, 422, "inputs.text"),
        (Literal('"\\ud800"'), 400, None),
        ([["a"]], 422, "inputs.text"),
    ):
        problem = instances(client, "sentiment", {"text": value})
        assert (problem["status"], problem.get("field")) == (status, field), problem
        assert lane("sentiment") == 0


def test_more_instances_than_rows_are_refused(client):
    body = {"instances": [{"text": "a"}] * 31}
    problem = _problem(client.post("/models/sentiment:predict", json=body))
    assert (problem["status"], problem["field"]) == (422, "instances")
    assert problem["detail"] == "expected at most 30 rows, got 31"


def test_an_error_does_not_list_all_unknown_inputs(client):
    body = {"inputs": {f"unknown{n}": 1 for n in range(100_000)}}
    problem = _problem(client.post("/models/sentiment:predict", json=body | {"outputs": None}))
    assert (problem["status"], problem["field"]) == (422, "inputs")
    assert len(problem["detail"]) < 200


OIP = "/v2/models/{}/infer"


BINARY: list[tuple[str, dict[str, Any], bytes, str]] = [
    ("sentiment", {"shape": [0] + [TOO_LARGE] * 3}, b"", "expected shape"),
    ("sentiment", {"shape": [3_000_000]}, bytes(12_000_000 - 200), "at most 30 rows"),
    ("sentiment", {"shape": [2]}, bytes(11_000_000), "but the binary data has more"),
    ("sentiment", {"shape": [25]}, bytes(100), "at most 20 texts or binary items"),
    ("sentiment", {"shape": [1]}, b"\1\0\0\0\xff", "text in UTF-8"),
    ("sentiment", {"shape": [1]}, b"\xff\xff\xff\xffab", "ends within an element"),
    ("digits", {"shape": [0] + [TOO_LARGE] * 3, "name": "image"}, b"", "expected shape"),
]


def test_binary_tensors_of_the_open_inference_protocol_are_refused(client, lane):
    for model, tensor, raw, detail in BINARY:
        parameters = {"binary_data_size": len(raw)}
        whole = {"name": "text", "datatype": "BYTES", "parameters": parameters} | tensor
        head = json.dumps({"inputs": [whole]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        began = time.process_time()
        response = client.post(OIP.format(model), data=head + raw, headers=headers)
        assert response.status_code == 400
        assert detail in response.json["error"]
        assert time.process_time() - began < 0.5
        assert lane(model) == 0


DATA: list[Any] = [[], ["a"] * 25, [["a"]], ["\ud800"], [[]], {"a": 1}, None]


def test_json_tensors_of_the_open_inference_protocol_are_refused(client, lane):
    for shape in ([1], [0] + [TOO_LARGE] * 3, [0, 2**62], [2**31]):
        for data in DATA:
            tensor = {"name": "text", "datatype": "BYTES", "shape": shape, "data": data}
            response = client.post(OIP.format("sentiment"), json={"inputs": [tensor]})
            assert response.status_code == 400, (shape, data)
            assert response.json["code"] in ("invalid_input", "invalid_request")
            assert lane("sentiment") == 0


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_inflated_up_to_the_limit_only(client, encoding):
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    body = compress(b'{"inputs":[' + bytes(60_000_000))
    tracemalloc.start()
    response = client.post(
        OIP.format("sentiment"), data=body, headers={"Content-Encoding": encoding}
    )
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert response.status_code == 413
    assert most < 40_000_000


BODIES: list[tuple[str, bytes, int, str | None]] = [
    (
        "/models/tokens:predict?input=tokens&shape=0,999999999,999999999,999999999",
        b"",
        422,
        None,
    ),
    ("/models/tokens:predict?input=tokens&shape=" + "9," * 40 + "9", b"", 422, "shape"),
    ("/models/tokens:predict?input=tokens&shape=-1", b"", 422, "shape"),
    ("/models/tokens:predict?input=tokens&shape=1,2000", bytes(16_000), 422, "inputs"),
    ("/models/digits:predict?input=image", png_header(50_000, 50_000), 422, "inputs.image"),
    ("/infer?model=digits&input=image", png_header(50_000, 50_000), 422, "inputs.image"),
    ("/models/digits:predict?version=99999999999999999999", b"x", 404, "version"),
    ("/models/digits:predict?timeout_ms=NaN", b"x", 422, "timeout_ms"),
]


def test_binary_bodies_are_refused(client, lane):
    for path, raw, status, field in BODIES:
        response = client.post(path, data=raw, content_type="application/octet-stream")
        problem = _problem(response)
        assert problem["status"] == status, problem
        assert field is None or problem["field"] == field
        assert lane("digits") == lane("tokens") == 0


def test_paging_parameters_are_refused(client):
    for value in ("%FF", "%00", "-1", "9" * 30, "9" * 5000, "NaN", "1e9", "1_0"):
        for path in ("/tasks?limit=", "/dead?limit=", "/tasks?cursor=", "/dead?cursor="):
            assert client.get(path + value).status_code == 400, path + value


def test_parameters_that_are_no_text_are_refused(app):
    for method, path in (("GET", "/tasks"), ("GET", "/dead"), ("POST", "/infer"), ("GET", "/ws")):
        environ = {"QUERY_STRING": "limit=\xff\xfe"}
        response = app.test_client().open(path, method=method, environ_overrides=environ)
        assert response.status_code == 400
        assert _problem(response)["code"] == "invalid_request"


def test_a_configuration_is_as_limited_as_a_body(client):
    config = '{"version_policy": {"x": ' + "[" * 5000 + "]" * 5000 + "}}"
    response = client.post(
        "/v2/repository/models/digits/load", json={"parameters": {"config": config}}
    )
    assert response.status_code == 400
    assert "nested" in response.get_json()["error"]


def test_texts_of_json_are_counted(client):
    body = b'{"inputs": {"text": [%s]}}' % b",".join([b'"a"'] * 400_000)
    problem = client.post("/v1/models/sentiment:predict", data=body).get_json()
    assert problem["status"] == 400
    assert "names and texts" in problem["detail"]
