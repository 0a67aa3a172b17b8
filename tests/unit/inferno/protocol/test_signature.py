"""Signatures: what a model takes, and what a client is told when it sends something else."""

from __future__ import annotations

import base64
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inferno.errors import InvalidInput, RequestError
from inferno.protocol.limits import Limits
from inferno.protocol.signature import Signature
from inferno.protocol.tensors import Binary
from tests.unit.inferno import strategies

LIMITS = Limits(text_bytes=100, image_bytes=50, rows=4)

#: Headers of pictures of 3x2 pixels, up to where the pixels begin.
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\3\0\0\0\2\x08\0\0\0\0....\0\0\0\1IDAT"
JPEG = b"\xff\xd8\xff\xc0\0\x0b\x08\0\2\0\3\1\1\x11\0\xff\xda"
GIF = b"GIF89a\3\0\2\0\0\0\0\x2c\0\0\0\0\3\0\2\0\0"
WEBP = b"RIFF\x24\0\0\0WEBPVP8 \x10\0\0\0\0\0\0\x9d\1\x2a\3\0\2\0"
WAV = b"RIFF\x24\0\0\0WAVEfmt "


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def tensor(name: str, dtype: str, *shape: int | str, **more: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape), **more}


def signature(*inputs: dict[str, Any], **more: Any) -> Signature:
    batched = "batch" in inputs[0]["shape"]
    outputs = [tensor("y", "float32", *(["batch"] if batched else []))]
    return Signature.model_validate({"inputs": inputs, "outputs": outputs} | more)


TEXT = signature(tensor("text", "string", "batch"))
IMAGE = signature(tensor("image", "bytes", "batch", content="image"))
AUDIO = signature(tensor("audio", "bytes", "batch", content="audio"))
VECTOR = signature(tensor("x", "float32", "batch", 3))
#: S1's example.
TOKENS = signature(
    tensor("tokens", "int64", "batch", "seq"), tensor("mask", "int64", "batch", "seq")
)
EITHER = signature(
    tensor("text", "string", "batch", optional=True),
    tensor("image", "bytes", "batch", optional=True, content="image"),
    one_of=["text", "image"],
)


def refusal(signature: Signature, values: dict[str, Any], limits: Limits = LIMITS) -> InvalidInput:
    with pytest.raises(InvalidInput) as raised:
        signature.parse(values, limits)
    return raised.value


# Names


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        ({"mask": [[1]]}, "Missing required input(s): tokens. Expected inputs: mask, tokens"),
        ({}, "Missing required input(s): mask, tokens. Expected inputs: mask, tokens"),
        (
            {"tokens": [[1]], "mask": [[1]], "z": 1, "a": 1},
            "Unexpected input(s): a, z. Expected inputs: mask, tokens",
        ),
    ],
)
def test_missing_and_unexpected_inputs_are_named(values: dict[str, Any], detail: str) -> None:
    error = refusal(TOKENS, values)
    assert (error.detail, error.field) == (detail, "inputs")


@pytest.mark.parametrize("values", [{"text": "a", "image": b64(PNG)}])
def test_exactly_one_of_a_group_must_be_given(values: dict[str, Any]) -> None:
    assert refusal(EITHER, values).detail == "Expected exactly one of these inputs: text, image"
    assert set(EITHER.parse({"text": "a"}, LIMITS)) == {"text"}
    assert set(EITHER.parse({"image": b64(PNG)}, LIMITS)) == {"image"}


def test_at_least_one_of_only_optional_inputs_must_be_given() -> None:
    optional = signature(tensor("a", "int64", "batch", optional=True))
    assert refusal(optional, {}).detail == "Expected at least one input. Expected inputs: a"
    assert refusal(EITHER, {}).field == "inputs"


# Shapes


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ([1, 2, 3], (1, 3)),
        ([[1, 2, 3]], (1, 3)),
        ([[1, 2, 3], [4, 5, 6]], (2, 3)),
        ({"shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}, (2, 3)),
    ],
)
def test_a_plain_row_may_leave_out_the_batch(value: Any, shape: tuple[int, ...]) -> None:
    assert VECTOR.parse({"x": value}, LIMITS)["x"].shape == shape


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([1, 2], "[1, 2]"),
        (1, "[]"),
        ([[[1, 2, 3]]], "[1, 1, 3]"),
        ([], "[1, 0]"),
        ([[]], "[1, 0]"),
        ({"shape": [0, 3], "data": []}, "[0, 3]"),
        ({"shape": [3], "data": [1, 2, 3]}, "[3]"),
    ],
)
def test_a_wrong_shape_is_told_with_the_expected_one(value: Any, got: str) -> None:
    error = refusal(VECTOR, {"x": value})
    assert error.detail == f"expected shape [batch, 3], got {got}"
    assert error.field == "inputs.x"


def test_a_free_dimension_has_one_size_in_all_inputs() -> None:
    error = refusal(TOKENS, {"tokens": [[1, 2]], "mask": [[1, 1, 1]]})
    assert (error.detail, error.field) == ("seq is 3, but 2 in tokens", "inputs.mask")


def test_inputs_have_equal_numbers_of_rows() -> None:
    error = refusal(TOKENS, {"tokens": [[1]], "mask": [[1], [1]]})
    assert (error.detail, error.field) == ("batch is 2, but 1 in tokens", "inputs.mask")


def test_a_free_dimension_has_one_size_within_an_input() -> None:
    square = signature(tensor("x", "float32", "batch", "n", "n"))
    assert square.parse({"x": [[[1, 2], [3, 4]]]}, LIMITS)["x"].shape == (1, 2, 2)
    assert refusal(square, {"x": [[[1, 2]]]}).detail == "n is 2, but 1 in x"


def test_a_model_without_batch_takes_scalars() -> None:
    scalar = signature(tensor("x", "float32"))
    assert not scalar.batched
    assert scalar.parse({"x": 1.5}, LIMITS)["x"].shape == ()
    assert refusal(scalar, {"x": [1.5]}).detail == "expected shape [], got [1]"


# Contents


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("", "expected text, got an empty string"),
        (["a", ""], "expected text, got an empty string"),
        ("\ud800", "expected valid Unicode, got an unpaired surrogate"),
        ("a" * 101, "expected text of at most 100 bytes, got 101"),
        ("é" * 51, "expected text of at most 100 bytes, got 102"),
        (["a"] * 5, "expected at most 4 rows, got 5"),
    ],
)
def test_texts_are_checked(value: Any, detail: str) -> None:
    error = refusal(TEXT, {"text": value})
    assert (error.detail, error.field) == (detail, "inputs.text")


def test_a_text_may_be_as_long_as_its_limit() -> None:
    assert TEXT.parse({"text": "é" * 50}, LIMITS)["text"][0] == "é" * 50


@pytest.mark.parametrize("raw", [PNG, JPEG, GIF, WEBP])
def test_images_are_known_by_their_first_bytes(raw: bytes) -> None:
    for text in (b64(raw), f"data:image/any;base64,{b64(raw)}"):
        assert IMAGE.parse({"image": text}, LIMITS)["image"].tolist() == [raw]


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("", "expected base64 of at least one byte, got nothing"),
        (b64(b"<svg/>"), "expected an image (PNG, JPEG, GIF, WebP), got other bytes"),
        (b64(WAV), "expected an image (PNG, JPEG, GIF, WebP), got other bytes"),
        (b64(PNG + b"." * 50), "expected at most 50 bytes, got 91"),
        (b64(PNG)[:-1], "malformed base64"),
    ],
)
def test_images_are_checked(value: str, detail: str) -> None:
    error = refusal(IMAGE, {"image": value})
    assert detail in error.detail
    assert error.field == "inputs.image"


@pytest.mark.parametrize("raw", [WAV, b"fLaC....", b"OggS....", b"ID3\x04....", b"\xff\xfb...."])
def test_audio_is_known_by_its_first_bytes(raw: bytes) -> None:
    for text in (b64(raw), f"data:audio/any;base64,{b64(raw)}"):
        assert AUDIO.parse({"audio": text}, LIMITS)["audio"].tolist() == [raw]


@pytest.mark.parametrize("raw", [PNG, WEBP, JPEG])
def test_audio_is_checked(raw: bytes) -> None:
    error = refusal(AUDIO, {"audio": b64(raw)})
    assert error.detail == "expected audio (WAV, FLAC, Ogg, MP3), got other bytes"
    assert error.field == "inputs.audio"


def test_bytes_that_are_no_image_pass_where_none_is_declared() -> None:
    audio = signature(tensor("audio", "bytes", "batch"))
    assert audio.parse({"audio": b64(WAV)}, LIMITS)["audio"].tolist() == [WAV]


# Plain values find their input


@pytest.mark.parametrize(
    ("value", "kind", "name"),
    [
        ("hello", "text", "text"),
        (["a", "b"], "text", "text"),
        (b64(PNG), "image", "image"),
        (f"data:image/png;base64,{b64(PNG)}", None, "image"),
    ],
)
def test_a_plain_value_is_given_to_the_input_that_can_hold_it(
    value: Any, kind: str | None, name: str
) -> None:
    assert EITHER.assign(value, kind) == {name: value}


def test_a_text_that_could_be_both_must_be_named() -> None:
    with pytest.raises(
        InvalidInput, match=r"more than one input.*text \(string\), image \(bytes\)"
    ):
        EITHER.assign("hello")


def test_a_required_input_goes_before_an_optional_one() -> None:
    both = signature(
        tensor("hint", "string", "batch", optional=True), tensor("text", "string", "batch")
    )
    assert both.assign("hello") == {"text": "hello"}


@pytest.mark.parametrize("value", [1, 1.5, True, [1, 2, 3], [[1.0]]])
def test_numbers_go_to_the_numeric_input(value: Any) -> None:
    assert VECTOR.assign(value) == {"x": value}


@pytest.mark.parametrize("value", ["text", None, [], [[]], {"a": 1}, [None]])
def test_what_no_input_can_hold_is_refused(value: Any) -> None:
    with pytest.raises(
        InvalidInput, match=r"no input can hold this value; give it by name: x \(float32\)"
    ):
        VECTOR.assign(value)


def test_audio_goes_to_bytes() -> None:
    both = signature(tensor("text", "string", "batch"), tensor("audio", "bytes", "batch"))
    assert both.assign(b64(WAV), "audio") == {"audio": b64(WAV)}


# Outputs


def test_a_selection_of_outputs_names_declared_ones() -> None:
    TEXT.check_outputs(["y"])
    for names, got in ((["y", "z", "a"], "a, z"), ([], "none")):
        with pytest.raises(InvalidInput) as raised:
            TEXT.check_outputs(names)
        assert raised.value.detail == f"Invalid output selection: {got}. Declared outputs: y"
        assert raised.value.field == "outputs"


# Declarations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "at least 1 item"),
        ({"outputs": []}, "at least 1 item"),
        ({"inputs": [tensor("x", "int64", "batch")] * 2}, "every name must be unique"),
        ({"inputs": [tensor("x", "complex64", "batch")]}, "expected one of bool, int8"),
        ({"inputs": [tensor("x", "int64", "batch", 0)]}, "expected positive integers and names"),
        ({"inputs": [tensor("x", "int64", "batch", -1)]}, "expected positive integers and names"),
        ({"inputs": [tensor("x", "int64", "batch", "")]}, "expected positive integers and names"),
        ({"inputs": [tensor("x", "int64", 2, "batch")]}, "can only be the first dimension"),
        ({"inputs": [tensor("x", "int64", 2)]}, "either every tensor has `batch`"),
        ({"inputs": [tensor("", "int64", "batch")]}, "at least 1 character"),
        ({"inputs": [tensor("x", "int64", "batch", typo=1)]}, "Extra inputs are not permitted"),
        ({"one_of": ["x"]}, "one_of: every name must be an optional input"),
        ({"one_of": ["nobody"]}, "one_of: every name must be an optional input"),
    ],
)
def test_a_wrong_declaration_is_refused(changes: dict[str, Any], message: str) -> None:
    good = {"inputs": [tensor("x", "int64", "batch")], "outputs": [tensor("y", "int64", "batch")]}
    Signature.model_validate(good)
    with pytest.raises(ValidationError, match=message):
        Signature.model_validate(good | changes)


def test_a_declared_dtype_may_have_another_name() -> None:
    assert signature(tensor("x", "torch.long", "batch")).input("x").dtype == "int64"


# Inputs that are no JSON


def test_a_binary_tensor_has_the_bytes_of_its_shape() -> None:
    rows = np.array([[1, 2, 3], [4, 5, 6]], "<f4")
    for shape, expected in (((2, 3), rows), ((1, 3), rows[:1]), ((3,), rows[:1])):
        values = VECTOR.assign(Binary(expected.tobytes(), shape))
        np.testing.assert_array_equal(VECTOR.parse(values, LIMITS)["x"], expected)


def test_a_binary_body_is_one_image() -> None:
    assert IMAGE.parse(IMAGE.assign(Binary(PNG)), LIMITS)["image"].tolist() == [PNG]


@pytest.mark.parametrize(
    ("taker", "value", "detail"),
    [
        (VECTOR, Binary(b"x" * 12), "a binary tensor of float32 needs its shape"),
        (VECTOR, Binary(b"x", (1, 3)), "shape [1, 3] of float32 is 12 bytes, but the body holds 1"),
        (VECTOR, Binary(b"x" * 8, (1, 2)), "expected shape [batch, 3], got [1, 2]"),
        (
            VECTOR,
            Binary(b"\xff" * 12, (3,)),
            "expected finite float32 values, got NaN, infinity or a number out of range",
        ),
        (TEXT, Binary(b"x"), "a string tensor must be sent as JSON, not as a binary body"),
        (IMAGE, Binary(WAV), "expected an image (PNG, JPEG, GIF, WebP), got other bytes"),
        (IMAGE, Binary(b"", None), "expected base64 of at least one byte, got nothing"),
        (
            IMAGE,
            Binary(PNG, (1,)),
            "a binary body is one element of a bytes tensor and has no shape",
        ),
    ],
)
def test_a_wrong_binary_body_is_refused(taker: Signature, value: Binary, detail: str) -> None:
    (name,) = (spec.name for spec in taker.inputs)
    error = refusal(taker, {name: value})
    assert (error.detail, error.field) == (detail, f"inputs.{name}")


def test_a_binary_body_that_no_input_can_hold_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no input can hold this value"):
        TEXT.assign(Binary(b"x"))


# Anything at all

json_values = strategies.json_values | st.just(b64(PNG))
members = st.dictionaries(st.sampled_from(["dtype", "shape", "data", "base64"]), json_values)


@pytest.mark.parametrize("taker", [TEXT, IMAGE, VECTOR, TOKENS, EITHER])
@given(data=st.data())
def test_any_json_is_parsed_or_refused_as_a_fault_of_the_request(
    taker: Signature, data: st.DataObject
) -> None:
    # Given values under the right names, or under any
    names = st.sampled_from([spec.name for spec in taker.inputs]) | st.text(max_size=3)
    values = data.draw(st.dictionaries(names, json_values | members, max_size=3))
    # When they are parsed, nothing but an error of the request is raised
    with suppress(RequestError):
        parsed = taker.parse(values, LIMITS)
        # Then what is taken is as declared
        for name, array in parsed.items():
            spec = taker.input(name)
            assert array.ndim == len(spec.shape)
            assert 0 < len(array) <= LIMITS.rows


@pytest.mark.parametrize("taker", [TEXT, VECTOR, EITHER])
@given(value=json_values, kind=st.sampled_from([None, "text", "image", "audio"]))
def test_any_plain_value_is_assigned_or_refused(
    taker: Signature, value: Any, kind: str | None
) -> None:
    with suppress(InvalidInput):
        (name,) = taker.assign(value, kind)
        assert taker.input(name) in taker.inputs


some_texts = st.text(max_size=110) | st.sampled_from(["", "\ud800", "é" * 50, "é" * 51, "a" * 101])
some_lists = st.lists(some_texts | st.integers(), max_size=5)
some_tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["string", "bytes", "BYTES", 7]),
        "shape": st.just([True]) | st.lists(st.integers(-1, 5), max_size=2),
        "data": some_lists,
    }
)


@given(value=some_texts | some_lists | some_tensors)
def test_texts_in_the_usual_forms_are_taken_as_the_closer_look_takes_them(value: Any) -> None:
    def result() -> Any:
        try:
            return TEXT.parse({"text": value}, LIMITS)["text"].tolist()
        except InvalidInput as error:
            return error.detail

    taken = result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inferno.protocol.signature._plain_texts", lambda *_: None)
        assert result() == taken


def test_read_only_inputs_from_base64_are_as_good_as_lists() -> None:
    row = np.array([[1, 2, 3]], "<f4")
    encoded = {"dtype": "float32", "shape": [1, 3], "base64": b64(row.tobytes())}
    np.testing.assert_array_equal(VECTOR.parse({"x": encoded}, LIMITS)["x"], row)
