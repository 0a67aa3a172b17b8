"""Tensors on the wire: round trips, and errors that name the field and the expectation."""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from inferno.errors import InvalidInput
from inferno.protocol import tensors
from inferno.protocol.tensors import DTYPES, NUMERIC, Array
from tests.unit.inferno.strategies import json_values

FIELD = "inputs.x"

#: Also no dimension, and dimensions of size 0.
shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def numeric(dtype: str) -> st.SearchStrategy[Array]:
    elements: dict[str, Any] = {}
    if NUMERIC[dtype].kind == "f":
        elements = {"allow_nan": False, "allow_infinity": False}
    return arrays.arrays(NUMERIC[dtype], shapes, elements=elements)


def objects(elements: st.SearchStrategy[Any]) -> st.SearchStrategy[Array]:
    return shapes.flatmap(lambda shape: arrays.arrays(object, shape, elements=elements))


texts = objects(st.text(st.characters(exclude_categories=["Cs"])))


def through_json(array: Array, dtype: str, codec: str) -> Array:
    """Write an array as a result is written, and read it as a request is read."""
    written = orjson.dumps(tensors.encode(array, dtype, codec), option=orjson.OPT_SERIALIZE_NUMPY)
    return tensors.decode(orjson.loads(written), dtype, FIELD)


def refusal(value: Any, dtype: str) -> InvalidInput:
    read = tensors.decode if isinstance(value, dict) else tensors.from_values
    with pytest.raises(InvalidInput) as raised:
        read(value, dtype, FIELD)
    assert raised.value.field == FIELD
    return raised.value


def attempt(read: Callable[[Any, str, str], Array], value: Any, dtype: str) -> Array | None:
    """Read a value; None when it is refused in the right way, and any other error passes."""
    try:
        return read(value, dtype, FIELD)
    except InvalidInput as error:
        return None if error.field == FIELD else pytest.fail("the error names no field")


# Round trips


@pytest.mark.parametrize("codec", ["json", "base64"])
@pytest.mark.parametrize("dtype", NUMERIC)
@given(data=st.data())
def test_numbers_come_back_as_they_went(dtype: str, codec: str, data: st.DataObject) -> None:
    array = data.draw(numeric(dtype))
    back = through_json(array, dtype, codec)
    assert back.dtype == NUMERIC[dtype]
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@given(array=texts)
def test_texts_come_back_as_they_went(array: Array) -> None:
    back = through_json(array, "string", "json")
    assert back.shape == array.shape
    assert back.tolist() == array.tolist()


@given(array=objects(st.binary()))
def test_bytes_come_back_as_they_went(array: Array) -> None:
    back = through_json(array, "bytes", "json")
    assert back.shape == array.shape
    assert back.tolist() == array.tolist()


@given(array=numeric("float32"))
def test_flat_data_and_nested_data_mean_the_same(array: Array) -> None:
    flat = {"shape": list(array.shape), "data": array.ravel().tolist()}
    np.testing.assert_array_equal(tensors.decode(flat, "float32", FIELD), array)


def test_rows_of_a_batch_are_written_without_their_neighbours() -> None:
    # Given a slice of a batch, and one that is not contiguous
    batch = np.arange(12, dtype="<i4").reshape(4, 3)
    for part in (batch[1:3], batch[:, 1:2], batch.T):
        for codec in ("json", "base64"):
            np.testing.assert_array_equal(through_json(part, "int32", codec), part)


def test_a_scalar_is_written_as_a_scalar() -> None:
    encoded = tensors.encode(np.array(1.5, "<f4"), "float32", "json")
    assert orjson.dumps(encoded, option=orjson.OPT_SERIALIZE_NUMPY) == (
        b'{"dtype":"float32","shape":[],"data":1.5}'
    )


# Names of dtypes


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *((dtype, dtype) for dtype in DTYPES),
        ("torch.float32", "float32"),
        ("float", "float32"),
        ("double", "float64"),
        ("half", "float16"),
        ("long", "int64"),
        ("FP32", "float32"),
        ("INT64", "int64"),
        ("UINT8", "uint8"),
        ("BOOL", "bool"),
        ("BYTES", "string"),
    ],
)
def test_other_names_of_dtypes_are_known(alias: str, name: str) -> None:
    assert tensors.dtype_name(alias) == name


@pytest.mark.parametrize("name", ["", "complex64", "Float32", "BF16", "object", "torch.", "int128"])
def test_other_dtypes_are_not(name: str) -> None:
    assert tensors.dtype_name(name) is None


def test_bytes_of_the_open_inference_protocol_fit_both_kinds_of_elements() -> None:
    assert tensors.decode({"datatype": "BYTES", "data": ["a"]}, "string", FIELD).tolist() == ["a"]
    encoded = {"datatype": "BYTES", "data": [base64.b64encode(b"\xff").decode()]}
    assert tensors.decode(encoded, "bytes", FIELD).tolist() == [b"\xff"]


# Plain values


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ([1, 2.5], "float32", [1, 2.5]),
        (2**70, "float32", float(2**70)),
        ([2**64 - 1, 0], "uint64", [2**64 - 1, 0]),
        ([-(2**63), 2**63 - 1], "int64", [-(2**63), 2**63 - 1]),
        ([True, False], "bool", [True, False]),
        ([[]], "float32", [[]]),
        ("text", "string", "text"),
        (["YQ==", "data:image/png;base64,Yg=="], "bytes", [b"a", b"b"]),
    ],
)
def test_plain_values_are_read(value: Any, dtype: str, expected: Any) -> None:
    assert tensors.from_values(value, dtype, FIELD).tolist() == expected


@pytest.mark.parametrize(
    ("value", "dtype", "expectation"),
    [
        ("1.5", "float32", "expected float32 values, got text"),
        ([1.5, "2.5"], "float32", "expected float32 values, got text at [1]"),
        ([[1.5], [None]], "float32", "expected float32 values, got null at [1][0]"),
        ([{}], "float32", "expected float32 values, got an object at [0]"),
        ([True, 2.0], "float32", "expected float32 values, got true or false at [0]"),
        ([2, True], "int64", "expected int64 values, got true or false at [1]"),
        ([1, 0], "bool", "expected bool values, got an integer at [0]"),
        ([1.0], "int64", "expected int64 values, got a fraction at [0]"),
        ([[1, 2], [3]], "int64", "expected int64 values in lists of equal length"),
        ([[1], 2], "int64", "expected int64 values in lists of equal length"),
        ([1, [2]], "int64", "expected int64 values in lists of equal length"),
        ([["a"], ["b", "c"]], "string", "expected string values in lists of equal length"),
        (["a", ["b"]], "string", "expected string values in lists of equal length"),
        ([256], "uint8", "expected uint8 values from 0 to 255"),
        ([-1], "uint64", "expected uint64 values from 0 to 18446744073709551615"),
        ([-129], "int8", "expected int8 values from -128 to 127"),
        ([2**63, -1], "int64", "expected int64 values from -9223372036854775808"),
        ([2**200], "int64", "expected int64 values from -9223372036854775808"),
        ([math.nan], "float64", "expected finite float64 values, got NaN"),
        ([math.inf], "float32", "expected finite float32 values"),
        ([1e300], "float32", "out of range"),
        ([70000.0], "float16", "out of range"),
        ([1], "string", "expected string values, got an integer at [0]"),
        (None, "string", "expected string values, got null"),
        (["%"], "bytes", "malformed base64"),
        (["YWI"], "bytes", "malformed base64"),
        (["YW\nI="], "bytes", "malformed base64"),
        (["YW-_"], "bytes", "malformed base64"),
        (["é"], "bytes", "malformed base64"),
        (["data:image/png,YQ=="], "bytes", "malformed base64"),
    ],
)
def test_a_wrong_plain_value_is_refused(value: Any, dtype: str, expectation: str) -> None:
    assert expectation in refusal(value, dtype).detail


@pytest.mark.parametrize("dtype", ["float32", "bool", "string", "bytes"])
@pytest.mark.parametrize("depth", [33, 100, 5000])
def test_lists_nested_too_deeply_are_refused(dtype: str, depth: int) -> None:
    value: Any = 1.0
    for _ in range(depth):
        value = [value]
    assert "nested more than 32 deep" in refusal(value, dtype).detail
    assert "nested more than 32 deep" in refusal({"data": value}, dtype).detail


def test_lists_may_be_nested_up_to_the_limit() -> None:
    value: Any = "text"
    for _ in range(tensors.MAX_DIMENSIONS):
        value = [value]
    assert tensors.from_values(value, "string", FIELD).ndim == tensors.MAX_DIMENSIONS


def test_one_long_text_among_numbers_costs_no_memory_for_the_others() -> None:
    # numpy would make a table of 100,001 texts of a million characters: 400 GB.
    value = ["x" * 1_000_000, *([""] * 100_000)]
    assert "got text at [0]" in refusal(value, "float32").detail


# Explicit tensors


@pytest.mark.parametrize(
    ("value", "dtype", "expectation"),
    [
        ({}, "float32", "either data or base64, not both"),
        ({"data": [1], "base64": "AAAA"}, "float32", "either data or base64, not both"),
        ({"data": [1], "dtype": "complex64"}, "float32", "unsupported dtype 'complex64'"),
        ({"data": [1], "dtype": None}, "float32", "unsupported dtype None"),
        ({"data": [1], "dtype": ["float32"]}, "float32", "unsupported dtype that is not a string"),
        ({"data": [1], "dtype": "int64"}, "float32", "dtype is int64, but the model expects"),
        ({"data": [1], "datatype": "INT64"}, "float32", "dtype is int64, but the model expects"),
        ({"data": ["a"], "dtype": "string"}, "bytes", "dtype is string, but the model expects"),
        ({"data": [1], "shap": [1]}, "float32", "unknown member 'shap'"),
        ({"data": [1, 2], "shape": [3]}, "float32", "shape [3] holds 3 elements, but data has 2"),
        ({"data": [[1, 2]], "shape": [2, 1]}, "float32", "data is nested as [1, 2]"),
        ({"data": [1], "shape": 1}, "float32", "shape must be a list of non-negative integers"),
        ({"data": [1], "shape": [-1]}, "float32", "shape must be a list of non-negative integers"),
        ({"data": [1], "shape": [True]}, "float32", "shape must be a list of non-negative"),
        ({"data": [1], "shape": [1.0]}, "float32", "shape must be a list of non-negative"),
        ({"data": [1], "shape": [2**31]}, "float32", "shape must be a list of non-negative"),
        ({"data": [1], "shape": [1] * 65}, "float32", "expected at most 32 dimensions, got 65"),
        ({"data": [1], "shape": [2**31 - 1] * 9999}, "float32", "expected at most 32 dimensions"),
        ({"base64": "", "shape": [2**31 - 1] * 32}, "float32", "bytes, but base64 holds 0"),
        ({"base64": "AAAA"}, "float32", "a base64 tensor needs its shape"),
        ({"base64": "AAAAAA==", "shape": [2]}, "float32", "is 8 bytes, but base64 holds 4"),
        ({"base64": "AAA", "shape": [1]}, "float32", "malformed base64: it is truncated"),
        ({"base64": [1], "shape": [1]}, "float32", "base64 must be a string"),
        ({"base64": None, "shape": [1]}, "float32", "base64 must be a string"),
        ({"base64": "YQ==", "shape": [1]}, "string", "a string tensor needs data"),
        ({"base64": "YQ==", "shape": [1]}, "bytes", "a bytes tensor needs data"),
        ({"base64": "AAUB", "shape": [3]}, "bool", "every byte of a bool tensor must be 0 or 1"),
        ({"base64": "AADAfw==", "shape": [1]}, "float32", "expected finite float32 values"),
    ],
)
def test_a_wrong_tensor_is_refused(value: Any, dtype: str, expectation: str) -> None:
    assert expectation in refusal(value, dtype).detail


def test_what_an_extreme_tensor_says_is_not_repeated_at_length() -> None:
    nested: Any = "float32"
    for _ in range(5000):
        nested = [nested]
    for value in (
        {"dtype": "x" * 10**6, "data": 1},
        {"y" * 10**6: 1},
        {"dtype": nested, "data": 1},
    ):
        assert len(refusal(value, "float32").detail) <= 1000


tensor_like = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "BYTES"]) | json_values,
        "shape": st.lists(st.integers(0, 3), max_size=3) | json_values,
        "data": json_values,
        "base64": st.binary(max_size=9).map(lambda raw: base64.b64encode(raw).decode())
        | json_values,
    },
)


@given(text=st.text("AQgw/+=zZ9-_ \n\té\0\ud800", max_size=9))
def test_base64_is_decoded_as_strictly_as_by_the_standard_library(text: str) -> None:
    try:
        decoded = tensors.decode_base64(text, FIELD)
    except InvalidInput:
        # The standard library overlooks a character too many at the end of a whole.
        with contextlib.suppress(ValueError):
            binascii.a2b_base64(text, strict_mode=True)
            assert text.endswith("=")
            assert len(text) % 4
    else:
        assert decoded == binascii.a2b_base64(text, strict_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@given(value=json_values)
def test_any_json_is_an_array_of_the_dtype_or_refused(dtype: str, value: Any) -> None:
    array = attempt(tensors.from_values, value, dtype)
    assert array is None or array.dtype == NUMERIC.get(dtype, np.dtype(object))


@pytest.mark.parametrize("dtype", DTYPES)
@given(value=tensor_like)
def test_any_mapping_is_an_array_of_its_shape_or_refused(dtype: str, value: Any) -> None:
    array = attempt(tensors.decode, value, dtype)
    if array is not None:
        assert array.dtype == NUMERIC.get(dtype, np.dtype(object))
        assert list(array.shape) == value.get("shape", list(array.shape))
