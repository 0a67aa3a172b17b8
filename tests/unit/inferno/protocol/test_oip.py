"""The Open Inference Protocol's requests and answers, without a server."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferno.errors import InvalidField, InvalidRequest
from inferno.protocol import oip, tensors
from inferno.protocol.limits import Limits
from inferno.protocol.signature import Signature

LIMITS = Limits(text_bytes=1000, image_bytes=1000, rows=100)


def parse(inputs: list[dict[str, Any]], binary: bytes = b"", **members: Any) -> Any:
    head = json.dumps({"inputs": inputs, **members}).encode()
    return oip.parse_infer(head + binary, str(len(head)), "m", None, LIMITS)


X = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}


@pytest.mark.parametrize(("given", "ours"), [(None, 0), (0, 0), (1, 9), (2, 8), (9, 1), (50, 0)])
def test_a_lower_priority_is_more_urgent_there(given, ours):
    parameters = {} if given is None else {"priority": given}
    assert parse([X], parameters=parameters)[0].priority == ours


def test_its_timeout_is_in_microseconds():
    assert parse([X], parameters={"timeout": 5000})[0].timeout_ms == 5
    assert parse([X], parameters={"timeout": 0})[0].timeout_ms is None


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"parameters": {"priority": -1}}, "parameters.priority"),
        ({"parameters": {"priority": True}}, "parameters.priority"),
        ({"parameters": {"timeout": 1.5}}, "parameters.timeout"),
        ({"parameters": {"timeout": 10**12}}, "parameters.timeout"),
        ({"parameters": {"sequence_end": True}}, "parameters.sequence_end"),
        ({"parameters": {"binary_data_output": 1}}, "parameters.binary_data_output"),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
         "outputs.y.parameters.binary_data"),
        ({"outputs": [{"name": "y", "parameters": {"classification": 0}}]},
         "outputs.y.parameters.classification"),
        ({"outputs": [{}]}, "outputs[0].name"),
        ({"inputs": [X, X]}, "inputs.x"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}, "inputs.x"),
        ({"inputs": [X | {"parameters": {"binary_data_size": 0}}]}, "inputs.x"),
        ({"inputs": [{**X, "shape": "1"}]}, "inputs[0].shape"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(members, field):
    with pytest.raises(InvalidRequest) as raised:
        parse(**{"inputs": [X]} | members)
    assert raised.value.field == field


NUMERIC = sorted(tensors.NUMERIC)


@given(
    st.sampled_from([*NUMERIC, "string", "bytes"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.randoms(use_true_random=False),
)
def test_binary_tensors_come_back_as_they_were_sent(dtype, inner, random):
    shape = [1, *inner]
    count = int(np.prod(shape))
    if dtype == "string":
        flat = np.array(["", "é", "abc"] * count, object)[:count]
        flat = np.array([text or "x" for text in flat], object)
        raw = tensors.framed(text.encode() for text in flat)
        result = {"dtype": dtype, "shape": shape, "data": flat.reshape(shape).tolist()}
    elif dtype == "bytes":
        flat = np.array([bytes([n % 256]) * (n % 3 + 1) for n in range(count)] or [], object)
        raw = tensors.framed(flat)
        result = tensors.encode(flat.reshape(shape), dtype, "json")
    else:
        kind = tensors.NUMERIC[dtype]
        flat = np.array([random.randint(0, 1) for _ in range(count)], kind)
        raw = flat.tobytes()
        result = tensors.encode(flat.reshape(shape), dtype, "base64")
    spec = {"name": "x", "dtype": dtype, "shape": ["batch", *(f"d{n}" for n in range(len(inner)))]}
    signature = Signature.model_validate({"inputs": [spec], "outputs": [spec]})
    head = {"name": "x", "shape": shape, "datatype": tensors.DATATYPES[dtype]}
    request, form = parse(
        [head | {"parameters": {"binary_data_size": len(raw)}}],
        raw,
        parameters={"binary_data_output": True},
    )
    if count:
        arrays = request.arrays(signature, LIMITS)
        assert arrays["x"].tolist() == flat.reshape(shape).tolist()
    stored = msgspec.json.encode({"model": "m", "version": 3, "outputs": {"x": result}})
    body, size = oip.write_infer(stored, "t", form, ())
    assert size is not None
    answer = json.loads(body[:size])
    assert body[size:] == raw
    assert answer["outputs"] == [head | {"parameters": {"binary_data_size": len(raw)}}]
    assert answer["model_version"] == "3"


def test_bfloat16_is_widened():
    raw = memoryview(struct.pack("<HH", 0x3F80, 0xC040))
    array = tensors.from_raw(tensors.Raw("BF16", [2], raw), "float32", "x")
    assert array.tolist() == [1.0, -3.0]


def test_of_equal_scores_the_first_class_is_better():
    output = {"dtype": "float32", "shape": [3], "data": [0.5, 0.25, 0.5]}
    stored = msgspec.json.encode({"model": "m", "version": 1, "outputs": {"y": output}})
    form = oip.Form("", frozenset(), {"y": 5})
    body, _ = oip.write_infer(stored, "t", form, ["a"])
    (answer,) = json.loads(body)["outputs"]
    assert answer["shape"] == [3]
    assert answer["data"] == ["0.500000:0:a", "0.500000:2", "0.250000:1"]


def written(output: dict[str, Any], form: oip.Form, labels: list[str]) -> Any:
    stored = msgspec.json.encode({"model": "m", "version": 1, "outputs": {"y": output}})
    body, _ = oip.write_infer(stored, "t", form, labels)
    return json.loads(body)["outputs"][0]


def test_scores_that_are_integers_are_written_as_such():
    output = {"dtype": "int64", "shape": [1, 3], "data": [[5, -1, 7]]}
    answer = written(output, oip.Form("", frozenset(), {"y": 2}), ["a", "b", "c"])
    assert answer["shape"] == [1, 2]
    assert answer["data"] == [["7:2:c", "5:0:a"]]


def test_texts_have_no_classes():
    output = {"dtype": "string", "shape": [1], "data": ["x"]}
    with pytest.raises(InvalidField, match="expected a numeric output") as raised:
        written(output, oip.Form("", frozenset(), {"y": 2}), [])
    assert raised.value.field == "outputs.y.parameters.classification"


@pytest.mark.parametrize(
    ("dtype", "numbers", "text"),
    [("float32", [0.1, 2.5], b"[0.1,2.5]"), ("bool", [True, False], b"[true,false]")],
)
def test_an_output_in_json_beside_a_binary_one_has_numbers_in_their_shortest_form(
    dtype, numbers, text
):
    array = np.array([numbers], tensors.NUMERIC[dtype])
    output = tensors.encode(array, dtype, "base64")
    stored = msgspec.json.encode({"model": "m", "version": 1, "outputs": {"y": output}})
    body, _ = oip.write_infer(stored, "t", oip.Form("", frozenset(["z"]), {}), [])
    assert b'"data":' + text in body


@pytest.mark.parametrize("data", ["a text", ["a text"], [["a text"]]])
def test_a_generated_text_is_found_in_any_shape(data):
    output = {"dtype": "string", "shape": [], "data": data}
    stored = msgspec.json.encode({"model": "m", "version": 1, "outputs": {"y": output}})
    assert oip.write_generate(stored, "t", "")["text_output"] == "a text"
