"""Inputs as bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from inferno.protocol import packing, tensors
from inferno.protocol.digest import digest

SHAPES = npst.array_shapes(min_dims=0, max_dims=3, max_side=4)
NUMERIC = st.sampled_from(list(tensors.NUMERIC.values())).flatmap(
    lambda dtype: npst.arrays(dtype, SHAPES)
)


def objects(elements: st.SearchStrategy[object]) -> st.SearchStrategy[tensors.Array]:
    return npst.arrays(object, SHAPES, elements=elements, fill=st.nothing())


ARRAYS = NUMERIC | objects(st.text(st.characters(exclude_categories=["Cs"]))) | objects(st.binary())


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), ARRAYS))
def test_what_was_packed_is_the_same_to_the_cache_and_to_a_model(inputs):
    unpacked = packing.unpack(packing.pack(inputs))
    assert digest(unpacked) == digest(inputs)
    assert list(unpacked) == list(inputs)


def test_arrays_of_any_layout_are_packed():
    array = np.arange(6, dtype="<f4").reshape(2, 3).T
    assert packing.unpack(packing.pack({"x": array}))["x"].tolist() == array.tolist()


def test_size_is_that_of_what_is_held():
    images = np.empty(2, dtype=object)
    images[:] = [b"1234", b"56"]
    assert packing.size({"images": images, "x": np.zeros((2, 3), dtype="<f4")}) == 6 + 24


def test_packed_inputs_are_explicit_tensors_in_json():
    image = np.empty(1, dtype=object)
    image[:] = [b"\x89PNG"]
    packed = packing.pack({"image": image, "x": np.array([1.0], dtype="<f4")})
    assert packing.in_json(packed) == {
        "image": {"dtype": "bytes", "shape": [1], "data": ["iVBORw=="]},
        "x": {"dtype": "float32", "shape": [1], "base64": "AACAPw=="},
    }


@pytest.mark.parametrize("payload", [b"", b"\xc0", b"\x81\xa1x\x01", b"\xff" * 9])
def test_other_bytes_are_refused(payload):
    with pytest.raises(ValueError, match="expected packed tensors"):
        packing.unpack(payload)
