"""Bodies of requests: three forms, and errors that name the field."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inferno.errors import InvalidField, InvalidInput, InvalidRequest
from inferno.protocol.limits import Limits
from inferno.protocol.requests import (
    InferRequest,
    convert_submit,
    is_binary,
    parse_binary,
    parse_predict,
    parse_submit,
)
from inferno.protocol.signature import Signature
from inferno.protocol.tensors import Binary
from tests.unit.inferno.strategies import json_values

LIMITS = Limits(text_bytes=100, image_bytes=100, rows=4)


def submit(**body: Any) -> InferRequest:
    return parse_submit(json.dumps(body).encode(), LIMITS)


def refusal(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        parse_submit(body, LIMITS)
    return raised.value


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {"model": "m", "inputs": {"text": "a"}},
            InferRequest(inputs={"text": "a"}, model="m"),
        ),
        (
            {"model_name": "m", "input_type": "text", "payload": "a", "priority": 9},
            InferRequest(inputs="a", model="m", input_type="text", priority=9),
        ),
        ({"model_id": "m", "input": "a"}, InferRequest(inputs="a", model="m")),
        ({"model_id": "m", "input": None}, InferRequest(inputs=None, model="m")),
        (
            {
                "model": "m",
                "version": 2,
                "inputs": {"x": [1]},
                "outputs": ["y"],
                "timeout_ms": 250,
                "codec": "base64",
            },
            InferRequest({"x": [1]}, "m", 2, ["y"], 0, 250.0, "base64"),
        ),
    ],
)
def test_every_form_of_a_submit_becomes_the_same_request(
    body: dict[str, Any], expected: InferRequest
) -> None:
    assert submit(**body) == expected
    assert convert_submit(body) == expected


@pytest.mark.parametrize(
    ("given", "events"),
    [
        ({}, ["completed"]),
        ({"webhook_events": None}, ["completed"]),
        ({"webhook_events": ["start"]}, ["start"]),
        ({"webhook_events_filter": ["completed", "start", "start"]}, ["completed", "start"]),
    ],
)
def test_a_webhook_is_told_of_the_end_unless_the_body_says_otherwise(
    given: dict[str, Any], events: list[str]
) -> None:
    body = {"model": "m", "inputs": {"x": 1}, "webhook": "https://a.example/hook?t=1"} | given
    expected = InferRequest({"x": 1}, "m", webhook=body["webhook"], webhook_events=events)
    assert submit(**body) == convert_submit(body) == expected
    del body["model"]
    assert parse_predict(json.dumps(body).encode(), "m", LIMITS) == expected


def test_without_a_webhook_there_are_no_events() -> None:
    request = submit(model="m", inputs=1)
    assert (request.webhook, request.webhook_events) == (None, None)


HOOK = {"inputs": {}, "webhook": "https://a.example"}


@pytest.mark.parametrize(
    ("body", "field", "detail"),
    [
        (HOOK | {"webhook": 1}, "webhook", "got `int`"),
        (HOOK | {"webhook": "ftp://a.example"}, "webhook", "begins with http:// or https://"),
        (HOOK | {"webhook_events": []}, "webhook_events", "length >= 1"),
        (
            HOOK | {"webhook_events": ["output"]},
            "webhook_events[0]",
            "completed or start, got 'output'",
        ),
        (HOOK | {"webhook_events": "start"}, "webhook_events", "got `str`"),
        (HOOK | {"webhook_events_filter": [1]}, "webhook_events_filter[0]", "got `int`"),
        (HOOK | {"webhook_events_filter": ["x"]}, "webhook_events_filter[0]", "got 'x'"),
        (
            HOOK | {"webhook_events": ["start"], "webhook_events_filter": ["start"]},
            "webhook_events_filter",
            "mean the same",
        ),
        ({"inputs": {}, "webhook_events": ["start"]}, "webhook_events", "needs a webhook"),
    ],
)
def test_a_wrong_webhook_names_the_field_and_the_expectation(
    body: dict[str, Any], field: str, detail: str
) -> None:
    for parse in (
        lambda: convert_submit(body | {"model": "m"}),
        lambda: parse_predict(json.dumps(body).encode(), "m", LIMITS),
    ):
        with pytest.raises(InvalidField) as raised:
            parse()
        assert raised.value.field == field
        assert detail in raised.value.detail


def test_a_predict_takes_its_model_from_the_path() -> None:
    request = parse_predict(
        b'{"inputs": {"x": {"dtype": "float32"}}, "timeout_ms": 5}', "m", LIMITS
    )
    assert request == InferRequest({"x": {"dtype": "float32"}}, "m", timeout_ms=5.0)


@pytest.mark.parametrize(
    ("body", "field", "detail"),
    [
        ({"inputs": 1}, "model", "missing field 'model'"),
        ({"model": "m"}, "inputs", "missing field 'inputs'"),
        (
            {"model": "m", "model_id": "m", "inputs": 1},
            "model_id",
            "model and model_id mean the same; give one of them",
        ),
        (
            {"model": "m", "inputs": 1, "payload": 1},
            "payload",
            "inputs and payload mean the same; give one of them",
        ),
        ({"model": "m", "inputs": 1, "typo": 2}, "typo", "unknown field 'typo'"),
        ({"model": 1, "inputs": 1}, "model", "Expected `str`, got `int`"),
        ({"model": None, "inputs": 1}, "model", "Expected `str`, got `null`"),
        ({"model": "m", "inputs": 1, "version": "2"}, "version", "got `str`"),
        ({"model": "m", "inputs": 1, "priority": 1.5}, "priority", "got `float`"),
        ({"model": "m", "inputs": 1, "priority": True}, "priority", "got `bool`"),
        (
            {"model": "m", "inputs": 1, "priority": 10},
            "priority",
            "expected an integer from 0 to 9",
        ),
        (
            {"model": "m", "inputs": 1, "priority": -1},
            "priority",
            "expected an integer from 0 to 9",
        ),
        ({"model": "m", "inputs": 1, "timeout_ms": 0}, "timeout_ms", "Expected `float` > 0"),
        ({"model": "m", "inputs": 1, "timeout_ms": -5}, "timeout_ms", "Expected `float` > 0"),
        ({"model": "m", "inputs": 1, "timeout_ms": 1e9}, "timeout_ms", "<= 86400000"),
        ({"model": "m", "inputs": 1, "timeout_ms": "5"}, "timeout_ms", "got `str`"),
        ({"model": "m", "inputs": 1, "outputs": "y"}, "outputs", "got `str`"),
        ({"model": "m", "inputs": 1, "outputs": ["y", 1]}, "outputs[1]", "got `int`"),
        (
            {"model": "m", "inputs": 1, "codec": "xml"},
            "codec",
            "expected base64 or json, got 'xml'",
        ),
        ({"model": "m", "input": 1, "input_type": "video"}, "input_type", "audio, image or text"),
    ],
)
def test_an_error_names_the_field_and_the_expectation(
    body: dict[str, Any], field: str, detail: str
) -> None:
    error = refusal(json.dumps(body).encode())
    assert error.field == field
    assert detail in error.detail
    with pytest.raises(InvalidRequest) as raised:
        convert_submit(body)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "empty body"),
        (b"no JSON", "not valid JSON"),
        (b"[1]", "Expected `object`, got `array`"),
        (b"null", "Expected `object`, got `null`"),
        (b'{"model": "m", "inputs": NaN}', "not valid JSON"),
        (b'{"model": "m", "inputs": Infinity}', "not valid JSON"),
        (b'{"model": "m", "inputs": 1e999}', "out of range"),
        (b'{"model": "m", "inputs": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"model": "m", "inputs": "\xff"}', "not valid JSON"),
        (b'{"\xc3": 1}', "not valid JSON"),
        (b'{"model": "m", "inputs": "\\ud800"}', "not valid JSON"),
        (b'{"model": "m", "inputs": 1} trailing', "not valid JSON"),
        (b'\xef\xbb\xbf{"model": "m", "inputs": 1}', "not valid JSON"),
        (b'{"model": "m", "inputs": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"inputs": ' + b'{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes, detail: str) -> None:
    assert detail in refusal(body).detail


def test_a_body_may_be_nested_and_is_refused_by_the_signature() -> None:
    # Given JSON that can just be read
    request = parse_submit(b'{"model": "m", "inputs": ' + b"[" * 500 + b"]" * 500 + b"}", LIMITS)
    spec = {"name": "x", "dtype": "float32", "shape": ["batch", "n"]}
    signature = Signature.model_validate({"inputs": [spec], "outputs": [spec | {"name": "y"}]})
    # Then the model's signature says what is wrong with it
    with pytest.raises(InvalidInput):
        request.arrays(signature, LIMITS)


def test_long_nonsense_is_not_repeated_at_length() -> None:
    for body in ({"x" * 10**6: 1}, {"model": "m", "inputs": 1, "codec": "x" * 10**6}):
        assert len(refusal(json.dumps(body).encode()).detail) <= 1000


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{}", "inputs"),
        (b'{"inputs": [1]}', "inputs"),
        (b'{"inputs": {}, "model": "other"}', "model"),
        (b'{"inputs": {}, "input_type": "text"}', "input_type"),
        (b'{"inputs": {}, "timeout_ms": 0}', "timeout_ms"),
        (b'{"inputs": {}, "outputs": {}}', "outputs"),
    ],
)
def test_a_wrong_predict_names_the_field(body: bytes, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_predict(body, "m", LIMITS)
    assert raised.value.field == field


def test_inputs_are_validated_against_the_signature() -> None:
    spec = {"name": "text", "dtype": "string", "shape": ["batch"]}
    signature = Signature.model_validate({"inputs": [spec], "outputs": [spec | {"name": "y"}]})
    for inputs in ("a", ["a"], {"text": "a"}):
        arrays = submit(model="m", inputs=inputs).arrays(signature, LIMITS)
        assert arrays["text"].tolist() == ["a"]
    with pytest.raises(InvalidInput, match="Invalid output selection: z"):
        submit(model="m", inputs="a", outputs=["z"]).arrays(signature, LIMITS)


names = st.sampled_from(
    [
        "model",
        "model_id",
        "inputs",
        "input",
        "version",
        "outputs",
        "priority",
        "timeout_ms",
        "codec",
        "webhook",
        "webhook_events",
    ]
)
messages = st.dictionaries(names | st.text(max_size=3), json_values, max_size=5)
bodies = messages.map(lambda body: json.dumps(body).encode())


@given(body=st.binary() | bodies | bodies.map(lambda body: body[:-1]))
@example(b'{"a\n`b": 1}')
@example(b'{" - at `$": 1}')
def test_any_body_is_a_request_or_refused(body: bytes) -> None:
    with suppress(InvalidRequest):
        assert isinstance(parse_submit(body, LIMITS), InferRequest)
    with suppress(InvalidRequest):
        assert isinstance(parse_predict(body, "m", LIMITS), InferRequest)


@given(message=messages)
def test_any_message_is_a_request_or_refused(message: dict[str, Any]) -> None:
    with suppress(InvalidRequest):
        assert isinstance(convert_submit(message), InferRequest)


def test_a_request_is_encoded_and_read_again_without_loss() -> None:
    request = submit(model="m", inputs={"text": "a"}, timeout_ms=5, outputs=["y"])
    assert msgspec.json.decode(msgspec.json.encode(request), type=InferRequest) == request


# Bodies that are the input itself


@pytest.mark.parametrize(
    ("content_type", "binary"),
    [
        ("application/octet-stream", True),
        ("Image/PNG; a=b", True),
        ("audio/wav", True),
        ("application/json", False),
        ("application/x-www-form-urlencoded", False),
        ("text/image/png", False),
        ("image/", False),
        ("", False),
        (None, False),
    ],
)
def test_content_types_say_what_a_body_is(content_type: str | None, binary: bool) -> None:
    assert is_binary(content_type) is binary


def test_query_says_the_rest_of_a_binary_body() -> None:
    query = {"model": "m", "input": "x", "shape": "1,2", "version": "3", "outputs": "y,z"}
    query |= {"priority": "4", "timeout_ms": "1.5", "codec": "base64"}
    assert parse_binary(b"raw", query) == InferRequest(
        inputs={"x": Binary(b"raw", (1, 2))},
        model="m",
        version=3,
        outputs=["y", "z"],
        priority=4,
        timeout_ms=1.5,
        codec="base64",
    )
    assert parse_binary(b"raw", {}, "m") == InferRequest(inputs=Binary(b"raw"), model="m")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({}, "model"),
        ({"model": "m", "shape": "1,x"}, "shape"),
        ({"model": "m", "shape": ""}, "shape"),
        ({"model": "m", "shape": ",".join(["1"] * 33)}, "shape"),
        ({"model": "m", "version": "one"}, "version"),
        ({"model": "m", "priority": "10"}, "priority"),
        ({"model": "m", "timeout_ms": "nan"}, "timeout_ms"),
        ({"model": "m", "codec": "xml"}, "codec"),
        ({"model": "m", "typo": "1"}, "typo"),
    ],
)
def test_wrong_parameter_of_a_binary_body_is_named(query: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidField) as raised:
        parse_binary(b"raw", query)
    assert raised.value.field == field
