"""JSON is bounded before it is decoded: depth, values and members."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inferno.errors import InvalidRequest
from inferno.protocol.decoding import decode
from inferno.protocol.limits import UNLIMITED, Limits
from inferno.settings import LimitSettings
from tests.unit.inferno.strategies import json_values

TIGHT = Limits(json_depth=3, json_values=10, json_members=4)
DEFAULT = Limits.of(LimitSettings())


def read(body: bytes | str, limits: Limits = TIGHT) -> Any:
    return decode(body, dict[str, Any], limits)


ADVICE = "send large tensors as base64 or as a binary body"


@pytest.mark.parametrize(
    ("document", "detail"),
    [
        ({"x": [[1]]}, None),
        ({"x": [[[1]]]}, "expected JSON nested at most 3 deep"),
        ({"x": {"y": {"z": {}}}}, "expected JSON nested at most 3 deep"),
        ({"x": [[1], [2], [3]]}, None),
        ({"x": "[[[[[[[[[[[[,,,,,,,,,,,,,:::::::::::"}, None),
        ({"x": '\\"[[[[[[\\\\"[[[[[[\\\\\\"', "[[[[[[[[[": ",,,,,,,,,,,,"}, None),
        ({"x": list(range(8))}, None),
        ({"x": list(range(9))}, f"expected JSON with at most 10 values; {ADVICE}"),
        ({"x": ["a,b"] * 8}, None),
        ({"x": ["a,b"] * 9}, f"expected JSON with at most 10 values; {ADVICE}"),
        ({"x": [[]] * 9}, f"expected JSON with at most 10 values; {ADVICE}"),
        ({"x": [{}] * 9}, f"expected JSON with at most 10 values; {ADVICE}"),
        ({str(n): ":" for n in range(4)}, None),
        (
            {str(n): 1 for n in range(5)},
            f"expected JSON with at most 4 members of objects; {ADVICE}",
        ),
    ],
)
def test_structure_is_bounded(document: dict[str, Any], detail: str | None) -> None:
    for body in (json.dumps(document), json.dumps(document, indent=3)):
        for given_body in (body, body.encode()):
            if detail is None:
                assert read(given_body) == document
            else:
                with pytest.raises(InvalidRequest) as raised:
                    read(given_body)
                assert raised.value.detail == detail


def _counts(value: Any) -> tuple[int, int, int]:
    """Return the depth, values and members of a document."""
    if isinstance(value, dict | list):
        inner = list(value.values()) if isinstance(value, dict) else value
        counts = [_counts(one) for one in inner]
        members = len(value) if isinstance(value, dict) else 0
        return (
            1 + max((depth for depth, _, _ in counts), default=0),
            # An empty list or object counts twice.
            1 + (sum(values for _, values, _ in counts) or 1),
            members + sum(nested for _, _, nested in counts),
        )
    return 0, 1, 0


@given(st.dictionaries(st.text(), json_values, max_size=5))
@example({"\\": '"', '"': ["\\\\", '\\"', "[{,:"]})
def test_limits_are_exact(document: dict[str, Any]) -> None:
    depth, values, members = _counts(document)
    body = msgspec.json.encode(document)
    fits = Limits(json_depth=depth, json_values=values, json_members=members)
    expected = msgspec.json.decode(body)
    assert decode(body, dict[str, Any], fits) == expected
    for name, most in (("json_depth", depth), ("json_values", values), ("json_members", members)):
        if most:
            with pytest.raises(InvalidRequest):
                decode(body, dict[str, Any], Limits(**{name: most - 1}))


MEMBERS = b",".join(b'"k%d":1' % n for n in range(900_000))


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":{"x":[[' + b",".join([b"[]"] * 3_900_000) + b"]]}}",
        b'{"inputs":{"x":[' + b",".join([b"1"] * 5_500_000) + b"]}}",
        b'{"inputs":{' + MEMBERS + b"}}",
        b'{"instances":[' + b",".join([b"{}"] * 3_900_000) + b"]}",
        b'{"instances":[' + b",".join([b'{"text":"a"}'] * 900_000) + b"]}",
        b'{"inputs":{"x":[' + b",".join([b'""'] * 3_900_000) + b"]}}",
        b'{"inputs":' + b"[" * 11_000_000,
        b'{"inputs":' + b'{"a":' * 2_000_000,
        b'{"inputs":["' + b'\\"[' * 3_900_000 + b'",' + b"[],[" * 50,
        b'{"inputs":"' + b"[\\\\" * 3_900_000,
    ],
)
def test_bodies_of_millions_of_values_are_refused_quickly(body: bytes) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequest):
        read(body, DEFAULT)
    assert time.process_time() - began < 0.25


def test_a_picture_as_numbers_is_decoded() -> None:
    picture = [[[0, 1, 2]] * 640] * 640
    assert read(msgspec.json.encode({"x": picture}), DEFAULT) == {"x": picture}


def test_text_is_no_structure() -> None:
    texts = {"text": ["[1,2,3]:{}" * 90_000] * 12}
    assert read(msgspec.json.encode(texts), DEFAULT) == texts


def test_no_limits_decode_everything() -> None:
    assert read(b'{"x":[[[[[[1]]]]]]}', UNLIMITED) == {"x": [[[[[[1]]]]]]}
