"""Made-up inputs for a model: valid ones that differ, and wrong ones of every kind."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferno.engine.collation import chunks
from inferno.engine.engine import Engine
from inferno.protocol.limits import UNLIMITED, Limits
from inferno.protocol.signature import BATCH, TensorSpec
from inferno.protocol.tensors import NUMERIC, Array, Tensors
from inferno.repository.package import Package

#: Texts of different lengths.
TEXTS = (
    "What a lovely day!",
    "No.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind that at all.",
    "It costs 12.50 euros, which is fair.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "ok",
    "Never again will I wait two hours for a cold meal and a rude word.",
    "42",
)
#: Size of a free dimension in made-up inputs.
FREE_SIZE = 8


def members(engine: Engine, count: int) -> list[Tensors]:
    """Return different inputs of one row each; the first is the warm-up sample.

    Args:
      engine: engine of the model. The other inputs are rows of its warm-up inputs, or the sample's
        values in another order.
      count: number of inputs; fewer are returned if they cannot be varied.
    """
    package = engine.package
    given = package.manifest.warm_up.inputs
    if given is not None and package.signature.batched:
        several = package.signature.parse(given, UNLIMITED)
        rows = list(chunks(several, 1))[:count]
        if len(rows) > 1:
            return rows
    sample = engine.sample()
    random = np.random.default_rng(0)
    padded = package.manifest.batching.pad
    found = [sample]
    for place in range(1, count):
        # Shorten the inputs that the model pads again.
        shorter = {
            name: array[(slice(None), *(slice(max(1, n - place)) for n in array.shape[1:]))]
            if name in padded and _is_free(package.signature.input(name))
            else array
            for name, array in sample.items()
        }
        found.append({name: _varied(array, place, random) for name, array in shorter.items()})
    return found


def _is_free(spec: TensorSpec) -> bool:
    return all(isinstance(dim, str) for dim in spec.shape[1:])


def picture() -> bytes:
    """Return a small PNG of random grey pixels."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _varied(array: Array, place: int, random: np.random.Generator) -> Array:
    if array.dtype.hasobject:
        first = array.flat[0] if array.size else b""
        if isinstance(first, str):
            return np.full(array.shape, TEXTS[place % len(TEXTS)], dtype=object)
        return array
    if array.size and (array != array.flat[0]).any():
        return random.permutation(array.ravel()).reshape(array.shape)
    if array.dtype.kind == "f":
        return random.random(array.shape).astype(array.dtype)
    # The meaning of integers is unknown; 0 and 1 are valid nearly everywhere.
    return random.integers(0, 2, array.shape).astype(array.dtype)


@dataclass(frozen=True)
class BadInput:
    """An input that a client may send by mistake."""

    #: What is wrong with the input.
    case: str
    inputs: dict[str, Any]
    #: Whether the signature forbids the input. If not, the model itself must handle it.
    forbidden: bool = True


def bad_inputs(package: Package, good: Tensors, limits: Limits) -> Iterator[BadInput]:
    """Yield every kind of input that the signature forbids, and odd ones that it allows.

    Args:
      package: package of the model.
      good: valid inputs of one row.
      limits: largest sizes of inputs.
    """
    signature = package.signature
    yield BadInput("no input at all", {})
    for spec in signature.inputs:
        if not spec.optional and len(good) > 1:
            rest = {name: array for name, array in good.items() if name != spec.name}
            yield BadInput(f"{spec.name} is missing", rest)
    yield BadInput("an unknown input", good | {"unexpected": 1})
    if len(signature.one_of) > 1:
        names = signature.one_of[:2]
        both = {name: plain(signature.input(name)) for name in names}
        yield BadInput(f"both {' and '.join(names)}", good | both)
    for spec in signature.inputs:
        beside = good
        if spec.name in signature.one_of:
            beside = {name: a for name, a in good.items() if name not in signature.one_of}
        value = good.get(spec.name, plain(spec))
        for case, wrong, forbidden in _bad_values(spec, value, limits):
            yield BadInput(f"{spec.name}: {case}", beside | {spec.name: wrong}, forbidden)


def plain(spec: TensorSpec) -> Array:
    """Return an array for a declared tensor: zeros, texts or pictures."""
    shape = [d if isinstance(d, int) else 1 if d == BATCH else FREE_SIZE for d in spec.shape]
    if spec.dtype in NUMERIC:
        return np.zeros(shape, NUMERIC[spec.dtype])
    text: Any = TEXTS[0] if spec.dtype == "string" else picture()
    return np.full(shape, text, dtype=object)


def _bad_values(spec: TensorSpec, good: Array, limits: Limits) -> Iterator[tuple[str, Any, bool]]:
    numeric = spec.dtype in NUMERIC
    yield ("text instead of numbers", "seven", True) if numeric else ("a number", 7, True)
    yield "null", None, True
    yield (
        "another dtype",
        {"dtype": "int8" if spec.dtype != "int8" else "float32", "shape": [1], "data": [1]},
        True,
    )
    yield "one dimension more", good[np.newaxis], True
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int):
            larger = np.concatenate([good, good.take([0], axis)], axis)
            yield f"{dim + 1} instead of {dim}", larger, True
            break
    if numeric:
        yield from _bad_numbers(spec, good)
    elif spec.dtype == "string":
        yield "an empty text", np.full(good.shape, "", dtype=object), True
        yield "half a character", np.full(good.shape, "\ud800", dtype=object), True
        long = np.full(good.shape, "x" * (limits.text_bytes + 1), dtype=object)
        yield f"more than {limits.text_bytes} bytes", long, True
        yield "only spaces", np.full(good.shape, "   ", dtype=object), False
        yield "emoji and control characters", np.full(good.shape, "🙂\x00\x1b", dtype=object), False
        yield "20,000 characters", np.full(good.shape, "word " * 4000, dtype=object), False
    else:
        yield "not base64", "%%%", True
        yield "no bytes", np.full(good.shape, b"", dtype=object), True
        if spec.content == "image":
            yield "not an image", np.full(good.shape, b"plain text", dtype=object), True
        cut = np.array([item[: max(24, len(item) // 2)] for item in good.flat], dtype=object)
        yield "cut off in the middle", cut.reshape(good.shape), False


def _bad_numbers(spec: TensorSpec, good: Array) -> Iterator[tuple[str, Any, bool]]:
    dtype = NUMERIC[spec.dtype]
    if good.ndim > 1 and math.prod(good.shape[1:]) > 1:
        yield "ragged lists", [[0], [0, 0]], True
    if dtype.kind == "f":
        yield "not a number", np.full(good.shape, np.nan).tolist(), True
    elif dtype.kind in "iu":
        info = np.iinfo(dtype)
        yield "fractions", np.full(good.shape, 0.5).tolist(), True
        yield "out of range", np.full(good.shape, int(info.max) + 1, dtype=object).tolist(), True
        yield "the largest number", np.full(good.shape, info.max, dtype), False
        if dtype.kind == "i":
            yield "negative", np.full(good.shape, -1, dtype), False
