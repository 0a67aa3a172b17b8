"""A model's signature: its inputs and outputs, and the check that given inputs fit.

Step *submit*: the web tier validates inputs before a task is queued. Step *forward*: the worker
decodes the same inputs with the same code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from inferno.errors import InvalidInput
from inferno.protocol import packing, pictures, tensors
from inferno.protocol.limits import Limits
from inferno.protocol.tensors import Array, Tensors

#: Name of the leading dimension, along which rows are batched.
BATCH = "batch"

#: Number of unknown names that an error shows.
_SHOWN = 5

#: First bytes of the accepted file formats, by declared content. Other bytes never reach a model's
#: decoder. WebP, WAV and AVI all begin with RIFF and a length; MP3 with a tag or a frame.
MAGIC = {
    "image": {
        "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
        "JPEG": re.compile(rb"\xff\xd8\xff"),
        "GIF": re.compile(rb"GIF8"),
        "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    },
    "audio": {
        "WAV": re.compile(rb"RIFF.{4}WAVE", re.DOTALL),
        "FLAC": re.compile(rb"fLaC"),
        "Ogg": re.compile(rb"OggS"),
        "MP3": re.compile(rb"ID3|\xff[\xe0-\xff]"),
    },
}


class TensorSpec(BaseModel):
    """One declared input or output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Name of the tensor in requests and results.")
    dtype: str = Field(description="One of " + ", ".join(tensors.DTYPES) + ".")
    shape: tuple[int | str, ...] = Field(
        description="Sizes of the dimensions: integers if fixed, names if free. `batch` is the "
        "leading dimension of rows."
    )
    optional: bool = Field(default=False, description="Whether clients may omit it.")
    content: Literal["text", "image", "audio"] | None = Field(
        default=None,
        description="Kind of content. The first bytes of `image` and `audio` are checked.",
    )
    description: str | None = Field(default=None, description="One line about the tensor.")

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        name = tensors.dtype_name(value)
        if name is None:
            raise ValueError(f"expected one of {', '.join(tensors.DTYPES)}")
        return name

    @field_validator("shape")
    @classmethod
    def _positive_or_named(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if any((isinstance(dim, int) and dim < 1) or dim == "" for dim in value):
            raise ValueError("expected positive integers and names")
        if BATCH in value[1:]:
            raise ValueError("`batch` can only be the first dimension")
        return value

    @property
    def batched(self) -> bool:
        """Whether the first dimension is the batch."""
        return bool(self.shape) and self.shape[0] == BATCH

    @cached_property
    def takes_texts(self) -> bool:
        """Whether it is one text for each row."""
        return self.dtype == "string" and self.shape == (BATCH,)

    def parse(self, value: Any, limits: Limits) -> Array:
        """Turn a plain value, explicit tensor, binary input or array into an array of this spec.

        A plain value may omit the batch dimension: one text, one image or one vector is one row.

        Raises:
          InvalidInput: the value does not fit or exceeds a limit; names the field and what is
            expected.
        """
        if self.takes_texts and (texts := _plain_texts(value, limits)) is not None:
            return texts
        field = f"inputs.{self.name}"

        def check(shape: tuple[int, ...]) -> None:
            self.check_shape(shape, limits)

        if isinstance(value, Mapping):
            array = tensors.decode(value, self.dtype, field, check)
        elif isinstance(value, np.ndarray):
            check(value.shape)
            array = tensors.of_dtype(value, self.dtype, field)
        elif isinstance(value, tensors.Raw):
            array = tensors.from_raw(value, self.dtype, field, check)
        else:
            binary = isinstance(value, tensors.Binary)
            read = tensors.from_binary if binary else tensors.from_values
            array = read(value, self.dtype, field, lambda shape: check(self._with_batch(shape)))
            array = array.reshape(self._with_batch(array.shape))
        self._check_content(array, limits, field)
        return array

    def _with_batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a plain value with the batch dimension, which it may omit."""
        omitted = self.batched and len(shape) == len(self.shape) - 1
        return (1, *shape) if omitted else shape

    def check_shape(self, shape: tuple[int, ...], limits: Limits) -> None:
        """Check a shape against the declared one and the limits.

        Raises:
          InvalidInput: the shape is wrong or too large.
        """
        field = f"inputs.{self.name}"
        fits = len(shape) == len(self.shape) and all(
            size == dim if isinstance(dim, int) else size > 0
            for size, dim in zip(shape, self.shape, strict=True)
        )
        if not fits:
            expected = f"[{', '.join(map(str, self.shape))}]"
            raise InvalidInput(f"expected shape {expected}, got {list(shape)}", field)
        if len(shape) > limits.rank:
            raise InvalidInput(
                f"expected at most {limits.rank} dimensions, got {len(shape)}", field
            )
        if self.batched and shape[0] > limits.rows:
            raise InvalidInput(f"expected at most {limits.rows} rows, got {shape[0]}", field)
        numeric = self.dtype in tensors.NUMERIC
        most = limits.elements if numeric else limits.items
        if (size := math.prod(shape)) > most:
            what = "elements" if numeric else "texts or binary items"
            raise InvalidInput(f"expected at most {most} {what}, got {size}", field)

    def _check_content(self, array: Array, limits: Limits, field: str) -> None:
        if self.dtype == "string":
            for text in array.ravel():
                _check_text(text, limits.text_bytes, field)
        elif self.dtype == "bytes":
            for raw in array.ravel():
                _check_bytes(raw, limits.image_bytes, self.content, field)

    def count_pixels(self, array: Array, limits: Limits) -> int:
        """Return the pixels of all pictures in an array of this spec.

        Raises:
          InvalidInput: a picture is damaged or has too many pixels.
        """
        if self.dtype != "bytes" or self.content not in (None, "image"):
            return 0
        field, total = f"inputs.{self.name}", 0
        for raw in array.ravel():
            try:
                width, height = pictures.size(raw) or (0, 0)
            except ValueError as exc:
                if self.content is None:
                    continue  # Bytes of another kind may begin like a picture.
                raise InvalidInput(str(exc), field) from None
            if width * height > limits.image_pixels:
                raise InvalidInput(
                    f"expected an image of at most {limits.image_pixels} pixels, got "
                    f"{width}x{height}",
                    field,
                )
            total += width * height
        return total


def _plain_texts(value: Any, limits: Limits) -> Array | None:
    """Return an array of texts if one quick check proves them valid; None if each must be checked.

    Knows the usual forms: a text, a list of texts, and the tensor that `tasks.intake.submit`
    writes.
    """
    if type(value) is dict and value.keys() == {"dtype", "shape", "data"}:
        shape, texts = value["shape"], value["data"]
        if value["dtype"] != "string" or type(shape) is not list or type(texts) is not list:
            return None
        if shape != [len(texts)] or type(shape[0]) is not int:
            return None
    else:
        texts = [value] if type(value) is str else value
    if type(texts) is not list or not 0 < len(texts) <= limits.rows:
        return None
    try:
        together = "".join(texts)
        width = 1
        if not together.isascii():
            width = 4  # Maximum bytes of one character.
            together.encode()
    except (TypeError, UnicodeEncodeError):
        return None
    sizes = [len(text) for text in texts]
    small = width * max(sizes) <= limits.text_bytes and len(texts) <= limits.items
    if not (min(sizes) and small and width * len(together) <= limits.input_bytes):
        return None
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


def _check_text(text: str, limit: int, field: str) -> None:
    if not text:
        raise InvalidInput("expected text, got an empty string", field)
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise InvalidInput("expected valid Unicode, got an unpaired surrogate", field) from None
    if size > limit:
        raise InvalidInput(f"expected text of at most {limit} bytes, got {size}", field)


def _check_bytes(raw: bytes, limit: int, content: str | None, field: str) -> None:
    if not raw:
        raise InvalidInput("expected base64 of at least one byte, got nothing", field)
    if len(raw) > limit:
        raise InvalidInput(f"expected at most {limit} bytes, got {len(raw)}", field)
    magic = MAGIC.get(content or "", {})
    if magic and not any(pattern.match(raw) for pattern in magic.values()):
        expected = "an image" if content == "image" else content
        raise InvalidInput(f"expected {expected} ({', '.join(magic)}), got other bytes", field)


class Signature(BaseModel):
    """The inputs and outputs of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[TensorSpec, ...] = Field(min_length=1, description="Inputs of the model.")
    outputs: tuple[TensorSpec, ...] = Field(min_length=1, description="Outputs of the model.")
    one_of: tuple[str, ...] = Field(
        default=(), description="Optional inputs, of which each task gives exactly one."
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Signature:
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ValueError(f"{kind}: every name must be unique")
        optional = {spec.name for spec in self.inputs if spec.optional}
        if not set(self.one_of) <= optional:
            raise ValueError("one_of: every name must be an optional input")
        if len({spec.batched for spec in (*self.inputs, *self.outputs)}) > 1:
            raise ValueError("either every tensor has `batch` as its first dimension, or none does")
        return self

    @property
    def batched(self) -> bool:
        """Whether several tasks can share one forward pass."""
        return self.inputs[0].batched

    @cached_property
    def _inputs(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.inputs}

    def input(self, name: str) -> TensorSpec:
        """Return the input with this name."""
        return self._inputs[name]

    def output(self, name: str) -> TensorSpec:
        """Return the output with this name."""
        return next(spec for spec in self.outputs if spec.name == name)

    def parse(self, values: Mapping[str, Any], limits: Limits) -> Tensors:
        """Validate named inputs and turn them into arrays.

        Returns:
          The arrays by name. A dimension of the same name has the same size in all of them.
        Raises:
          InvalidInput: an input is wrong, missing or unknown; names the field and what is expected.
        """
        self._check_names(values)
        if len(values) == 1:
            [(only, value)] = values.items()
            if self._inputs[only].takes_texts:
                texts = _plain_texts(value, limits)
                if texts is not None:
                    return {only: texts}
        arrays: Tensors = {}
        bound: dict[str, tuple[int, str]] = {}
        for name, value in values.items():
            spec = self._inputs[name]
            array = arrays[name] = spec.parse(value, limits)
            if len(values) == array.ndim == 1:
                continue
            for dim, size in zip(spec.shape, array.shape, strict=True):
                if isinstance(dim, str):
                    known, other = bound.setdefault(dim, (size, name))
                    if known != size:
                        raise InvalidInput(
                            f"{dim} is {size}, but {known} in {other}", f"inputs.{name}"
                        )
        self._check_totals(arrays, limits)
        return arrays

    def check_shapes(self, arrays: Tensors, limits: Limits) -> None:
        """Check the names and shapes of inputs whose content is not known yet.

        Raises:
          InvalidInput: an input is missing or unknown, or its shape is wrong or too large.
        """
        self._check_names(arrays)
        for name, array in arrays.items():
            self._inputs[name].check_shape(array.shape, limits)

    def _check_totals(self, arrays: Tensors, limits: Limits) -> None:
        """Check what all inputs of a task have together."""
        counts = {False: 0, True: 0}
        for array in arrays.values():
            counts[array.dtype.hasobject] += array.size
        for given, most, what in (
            (counts[False], limits.elements, "elements"),
            (counts[True], limits.items, "texts or binary items"),
        ):
            if given > most:
                raise InvalidInput(f"expected at most {most} {what} in all, got {given}", "inputs")
        if (size := packing.size(arrays)) > limits.input_bytes:
            raise InvalidInput(
                f"expected inputs of at most {limits.input_bytes} bytes, got {size}", "inputs"
            )
        pixels = sum(self._inputs[name].count_pixels(a, limits) for name, a in arrays.items())
        if pixels > limits.total_pixels:
            raise InvalidInput(
                f"expected images of at most {limits.total_pixels} pixels in all, got {pixels}",
                "inputs",
            )

    @cached_property
    def _required(self) -> frozenset[str]:
        return frozenset(spec.name for spec in self.inputs if not spec.optional)

    def _check_names(self, values: Mapping[str, Any]) -> None:
        if values and values.keys() == self._required and not self.one_of:
            return
        declared = self._inputs
        missing = [s.name for s in self.inputs if not s.optional and s.name not in values]
        unexpected = values.keys() - declared.keys()
        if missing or unexpected or not values:
            expected = f"Expected inputs: {', '.join(sorted(declared))}"
            if missing:
                names = ", ".join(sorted(missing))
                raise InvalidInput(f"Missing required input(s): {names}. {expected}", "inputs")
            if unexpected:
                names = _some(unexpected)
                raise InvalidInput(f"Unexpected input(s): {names}. {expected}", "inputs")
            raise InvalidInput(f"Expected at least one input. {expected}", "inputs")
        if self.one_of and len(values.keys() & set(self.one_of)) != 1:
            raise InvalidInput(
                f"Expected exactly one of these inputs: {', '.join(self.one_of)}", "inputs"
            )

    def assign(self, value: Any, kind: str | None = None) -> dict[str, Any]:
        """Assign one plain value to the input that can hold it.

        Args:
          value: a text, a base64 or data-URI image, a number, a (nested) list of these, or a
            `tensors.Binary`.
          kind: the client's `input_type`: `text`, `image`, `audio` or None.
        Returns:
          The value by the input's name.
        Raises:
          InvalidInput: no input can hold it, or more than one.
        """
        fitting = [spec for spec in self.inputs if _can_hold(spec, value, kind)]
        if len(fitting) > 1:
            # Prefer the required input: a client names an optional one when it means that.
            fitting = [spec for spec in fitting if not spec.optional] or fitting
        if len(fitting) != 1:
            inputs = ", ".join(f"{spec.name} ({spec.dtype})" for spec in self.inputs)
            count = "no input" if not fitting else "more than one input"
            raise InvalidInput(f"{count} can hold this value; give it by name: {inputs}", "inputs")
        return {fitting[0].name: value}

    def check_outputs(self, names: Sequence[str]) -> None:
        """Check the outputs that a client selects.

        Raises:
          InvalidInput: the selection is empty, or names an unknown output.
        """
        declared = [spec.name for spec in self.outputs]
        unknown = set(names) - set(declared)
        if unknown or not names:
            got = _some(unknown) or "none"
            raise InvalidInput(
                f"Invalid output selection: {got}. Declared outputs: {', '.join(declared)}",
                "outputs",
            )


def _some(names: Collection[Any]) -> str:
    """List a few of the names that a client has made up; there may be very many."""
    first = ", ".join(sorted(f"{name!s:.40}" for name in islice(names, _SHOWN)))
    return first if len(names) <= _SHOWN else f"{first} and {len(names) - _SHOWN} more"


def _can_hold(spec: TensorSpec, value: Any, kind: str | None) -> bool:
    if isinstance(value, tensors.Binary):
        return spec.dtype == "bytes" if value.shape is None else spec.dtype in tensors.NUMERIC
    leaf = value
    while isinstance(leaf, list) and leaf:
        leaf = leaf[0]
    if not isinstance(leaf, str):
        return spec.dtype in tensors.NUMERIC and isinstance(leaf, bool | int | float)
    if kind in ("image", "audio") or leaf.startswith("data:image/"):
        return spec.dtype == "bytes"
    if kind == "text":
        return spec.dtype == "string"
    return spec.dtype in ("string", "bytes")
