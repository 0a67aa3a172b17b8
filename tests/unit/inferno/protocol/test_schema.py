"""JSON Schemas of a model: valid is what its signature accepts."""

from __future__ import annotations

import base64
import copy
from typing import Any

import jsonschema_rs
import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from inferno.errors import InvalidInput
from inferno.protocol.limits import Limits
from inferno.protocol.requests import parse_predict
from inferno.protocol.schema import inputs_schema, request_schema, response_schema
from inferno.protocol.signature import BATCH, Signature, TensorSpec
from inferno.protocol.tensors import DTYPES, NUMERIC, Tensors, encode

LIMITS = Limits(text_bytes=20, image_bytes=50, rows=3)

#: The largest number that becomes a finite float32.
NEXT_TO_LARGEST = float(np.nextafter(2.0**128 - 2.0**103, 0))

#: Sizes of free dimensions in generated documents.
SIZES = {BATCH: 2, "n": 3, "m": 1}


@st.composite
def specs(draw: st.DrawFn, name: str, batched: bool, optional: bool) -> TensorSpec:
    dims = draw(st.lists(st.sampled_from([1, 2, "n", "m"]), max_size=2))
    return TensorSpec(
        name=name,
        dtype=draw(st.sampled_from(DTYPES)),
        shape=(BATCH, *dims) if batched else tuple(dims),
        optional=optional,
    )


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    batched = draw(st.booleans())
    optional = draw(st.lists(st.booleans(), min_size=1, max_size=3))
    inputs = [draw(specs(f"x{i}", batched, one)) for i, one in enumerate(optional)]
    free = [spec.name for spec in inputs if spec.optional]
    one_of = free if len(free) > 1 and draw(st.booleans()) else []
    outputs = [draw(specs("y", batched, False))]
    return Signature(inputs=tuple(inputs), outputs=tuple(outputs), one_of=tuple(one_of))


@st.composite
def elements(draw: st.DrawFn, dtype: str) -> Any:
    if dtype == "string":
        return draw(st.text(st.characters(codec="ascii"), min_size=1, max_size=5))
    if dtype == "bytes":
        text = base64.b64encode(draw(st.binary(min_size=1, max_size=5))).decode()
        return draw(st.sampled_from([text, f"data:application/x;base64,{text}"]))
    kind = NUMERIC[dtype]
    if kind.kind == "b":
        return draw(st.booleans())
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return draw(st.integers(int(info.min), int(info.max)))
    most = float(np.finfo(kind).max)
    return draw(st.floats(-most, most) | st.integers(-9, 9))


@st.composite
def nested(draw: st.DrawFn, dtype: str, shape: tuple[int, ...]) -> Any:
    if not shape:
        return draw(elements(dtype))
    return [draw(nested(dtype, shape[1:])) for _ in range(shape[0])]


def flat(value: Any) -> list[Any]:
    return [leaf for one in value for leaf in flat(one)] if isinstance(value, list) else [value]


@st.composite
def given_inputs(draw: st.DrawFn, spec: TensorSpec) -> Any:
    """One of the forms in which a client may give an input."""
    shape = tuple(dim if isinstance(dim, int) else SIZES[dim] for dim in spec.shape)
    value = draw(nested(spec.dtype, shape))
    forms: list[Any] = [
        value,
        {"data": value},
        {"datatype": spec.dtype, "shape": list(shape), "data": value},
        {"dtype": spec.dtype, "shape": list(shape), "data": flat(value), "name": 1},
    ]
    if spec.dtype in NUMERIC:
        raw = np.array(value, NUMERIC[spec.dtype]).reshape(shape).tobytes()
        forms.append({"shape": list(shape), "base64": base64.b64encode(raw).decode()})
    return draw(st.sampled_from(forms))


@st.composite
def documents(draw: st.DrawFn, signature: Signature) -> dict[str, Any]:
    """Inputs by name, as a client may give them."""
    chosen = {draw(st.sampled_from(signature.one_of))} if signature.one_of else set()
    return {
        spec.name: draw(given_inputs(spec))
        for spec in signature.inputs
        if not spec.optional
        or spec.name in chosen
        or (spec.name not in signature.one_of and draw(st.booleans()))
    }


def accepts(signature: Signature, inputs: Any) -> bool:
    try:
        signature.parse(inputs, LIMITS)
    except InvalidInput:
        return False
    return True


def validator(schema: dict[str, Any]) -> Any:
    return jsonschema_rs.Draft202012Validator(schema)


@given(st.data())
def test_what_a_signature_accepts_is_valid(data: st.DataObject) -> None:
    signature = data.draw(signatures())
    inputs = data.draw(documents(signature))
    assume(inputs)
    assert accepts(signature, inputs)
    validator(inputs_schema(signature, LIMITS)).validate(inputs)


#: Returns what is wrong with a document, and with its schema too.
def _without_required(signature: Signature, inputs: dict[str, Any]) -> None:
    name = next(spec.name for spec in signature.inputs if not spec.optional)
    del inputs[name]


def _unexpected(signature: Signature, inputs: dict[str, Any]) -> None:
    inputs["unexpected"] = 1


def _all_of_one_of(signature: Signature, inputs: dict[str, Any]) -> None:
    value = inputs[next(name for name in signature.one_of if name in inputs)]
    inputs |= dict.fromkeys(signature.one_of, value)


def _null(signature: Signature, inputs: dict[str, Any]) -> None:
    inputs[next(iter(inputs))] = None


def _empty(signature: Signature, inputs: dict[str, Any]) -> None:
    inputs[next(iter(inputs))] = []


def _too_deep(signature: Signature, inputs: dict[str, Any]) -> None:
    name = next(iter(inputs))
    inputs[name] = {"data": [[[[[1]]]]]}


def _other_dtype(signature: Signature, inputs: dict[str, Any]) -> None:
    name = next(iter(inputs))
    dtype = "int8" if signature.input(name).dtype != "int8" else "int16"
    inputs[name] = {"dtype": dtype, "shape": [1], "data": [1]}


def _unknown_member(signature: Signature, inputs: dict[str, Any]) -> None:
    inputs[next(iter(inputs))] = {"data": [1], "dimension": 1}


def _two_contents(signature: Signature, inputs: dict[str, Any]) -> None:
    inputs[next(iter(inputs))] = {"shape": [1], "data": [1], "base64": "AAAA"}


def _object_elements(signature: Signature, inputs: dict[str, Any]) -> None:
    inputs[next(iter(inputs))] = {"shape": [1], "data": [{}]}


DAMAGES = [
    _without_required, _unexpected, _all_of_one_of, _null, _empty, _too_deep, _other_dtype,
    _unknown_member, _two_contents, _object_elements,
]  # fmt: skip


@given(st.data())
@settings(max_examples=100)
def test_what_is_wrong_is_refused_by_both(data: st.DataObject) -> None:
    signature = data.draw(signatures())
    inputs = copy.deepcopy(data.draw(documents(signature)))
    assume(inputs)
    try:
        data.draw(st.sampled_from(DAMAGES))(signature, inputs)
    except StopIteration:
        assume(False)
    assert not accepts(signature, inputs)
    assert not validator(inputs_schema(signature, LIMITS)).is_valid(inputs)


def signature_of(dtype: str, *shape: int | str, **more: Any) -> Signature:
    spec = {"name": "x", "dtype": dtype, "shape": list(shape), **more}
    output = {"name": "y", "dtype": "float32", "shape": [BATCH] if BATCH in shape else []}
    return Signature.model_validate({"inputs": [spec], "outputs": [output]})


@pytest.mark.parametrize(
    ("signature", "value", "valid"),
    [
        (signature_of("string", "batch"), "a", True),
        (signature_of("string", "batch"), "", False),
        (signature_of("string", "batch"), "a" * 21, False),
        (signature_of("string", "batch"), ["a"] * 3, True),
        (signature_of("string", "batch"), ["a"] * 4, False),
        (signature_of("bytes", "batch"), "AAAA", True),
        (signature_of("bytes", "batch"), "data:image/png;base64,AAAA", True),
        (signature_of("bytes", "batch"), "data:AAAA", False),
        (signature_of("bytes", "batch"), "not base64", False),
        (signature_of("int8", "batch"), 127, True),
        (signature_of("int8", "batch"), 128, False),
        (signature_of("uint64", "batch"), 2**64 - 1, True),
        (signature_of("uint64", "batch"), -1, False),
        (signature_of("int32", "batch"), 1.5, False),
        (signature_of("int32", "batch"), True, False),
        (signature_of("bool", "batch"), 1, False),
        (signature_of("float32", "batch"), 1, True),
        (signature_of("float32", "batch"), NEXT_TO_LARGEST, True),
        (signature_of("float32", "batch"), 2.0**128 - 2.0**103, False),
        (signature_of("float16", "batch"), 65519.9, True),
        (signature_of("float16", "batch"), 65520, False),
        (signature_of("float64", "batch"), 1.7e308, True),
        (signature_of("float32", "batch", 2), [1, 2], True),
        (signature_of("float32", "batch", 2), [[1, 2]] * 3, True),
        (signature_of("float32", "batch", 2), [[1, 2]] * 4, False),
        (signature_of("float32", "batch", 2), [1, 2, 3], False),
        (signature_of("float32", "batch", 2), 1, False),
        (signature_of("float32", "batch", 2), {"data": [1, 2]}, False),
        (signature_of("float32", "batch", 2), {"shape": [1, 2], "data": [1, 2]}, True),
        (signature_of("float32", "batch", 2), {"shape": [2], "data": [1, 2]}, False),
        (signature_of("float32", "batch", 2), {"base64": "AAAAAAAAAAA="}, False),
        (signature_of("float32", "batch", 1), {"dtype": "FP32", "data": [[1]]}, True),
        (signature_of("float32", "batch", 1), {"dtype": "torch.float", "data": [[1]]}, True),
        (signature_of("bytes", "batch"), {"datatype": "BYTES", "data": ["AAAA"]}, True),
        (signature_of("string", "batch"), {"datatype": "BYTES", "data": ["a"]}, True),
        (signature_of("string", "batch"), {"shape": [1], "base64": "AAAA"}, False),
        (signature_of("float32"), 1.5, True),
        (signature_of("float32"), [1.5], False),
        (signature_of("float32"), {"shape": [], "data": 1}, True),
    ],
)
def test_values_are_valid_as_the_signature_says(
    signature: Signature, value: Any, valid: bool
) -> None:
    assert accepts(signature, {"x": value}) is valid
    assert validator(inputs_schema(signature, LIMITS)).is_valid({"x": value}) is valid


@pytest.mark.parametrize(
    "value", [[[1, 2], [1]], {"shape": [2, 2], "data": [1]}, {"shape": [1, 1], "base64": "AAAA"}]
)
def test_what_a_schema_cannot_say_is_refused_by_the_signature(value: Any) -> None:
    signature = signature_of("float32", "batch", "n")
    assert validator(inputs_schema(signature, LIMITS)).is_valid({"x": value})
    assert not accepts(signature, {"x": value})


def test_body_of_a_request_is_that_of_a_predict() -> None:
    signature = signature_of("string", "batch")
    schema = validator(request_schema(signature, LIMITS))
    for body in ({"inputs": {"x": "a"}}, {"inputs": {"x": "a"}, "outputs": ["y"], "priority": 9}):
        schema.validate(body)
        wanted = parse_predict(msgspec.json.encode(body), "m", LIMITS)
        assert set(wanted.arrays(signature, LIMITS)) == {"x"}
    wrongs: list[dict[str, Any]] = [
        {"outputs": ["z"]}, {"outputs": []}, {"priority": 10}, {"codec": "xml"},
    ]  # fmt: skip
    for wrong in wrongs:
        assert not schema.is_valid({"inputs": {"x": "a"}} | wrong)


@st.composite
def results(draw: st.DrawFn, signature: Signature) -> Tensors:
    """Outputs as a model may return them."""
    arrays = {}
    for spec in signature.outputs:
        shape = tuple(dim if isinstance(dim, int) else SIZES[dim] for dim in spec.shape)
        if spec.dtype in NUMERIC:
            value = draw(nested(spec.dtype, shape))
            arrays[spec.name] = np.array(value, NUMERIC[spec.dtype]).reshape(shape)
        else:
            array = arrays[spec.name] = np.empty(shape, dtype=object)
            array[...] = "text" if spec.dtype == "string" else b"bytes"
    return arrays


@given(st.data())
def test_answers_of_a_model_are_valid(data: st.DataObject) -> None:
    signature = data.draw(signatures())
    codec = data.draw(st.sampled_from(["json", "base64"]))
    outputs = {
        name: encode(array, signature.output(name).dtype, codec)
        for name, array in data.draw(results(signature)).items()
    }
    for tensor in outputs.values():
        if isinstance(tensor.get("data"), np.ndarray):
            tensor["data"] = tensor["data"].tolist()
    answer = {
        "outputs": outputs,
        "task_id": "1",
        "model": "m",
        "version": 1,
        "timings": dict.fromkeys(
            ("queue_ms", "batch_wait_ms", "inference_ms", "total_ms"), 1.5
        ),
        "batch": {
            "id": "b", "size": 1, "rows": 1, "flush_reason": "idle", "predicted_ms": 0, "run_ms": 1,
        },
        "worker": "w",
    }  # fmt: skip
    schema = validator(response_schema(signature))
    schema.validate(answer)
    assert not schema.is_valid(answer | {"outputs": outputs | {"z": outputs["y"]}})
    assert not schema.is_valid(answer | {"outputs": {"y": outputs["y"] | {"dtype": "other"}}})
