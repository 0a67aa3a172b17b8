"""Example calls: shell commands that call a model with fitting inputs."""

from __future__ import annotations

import json
import shlex
from typing import Any

import numpy as np

from inferno.protocol.signature import BATCH, TensorSpec
from inferno.protocol.tensors import NUMERIC, Array
from inferno.repository.package import Package

#: Text in examples.
SAMPLE_TEXT = "What a lovely day!"
#: Image in examples: a grey pixel, as PNG in base64.
_PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
#: Maximum number of elements that an example writes out.
_LISTED = 64


def example_call(url: str, package: Package) -> str:
    """Return a shell command that calls a model.

    Args:
      url: URL of the platform.
      package: the model's package.
    """
    inputs = sample_inputs(package)
    target = f"{url}/v1/models/{package.name}:predict"
    if all(value.size <= _LISTED for value in inputs.values() if isinstance(value, np.ndarray)):
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in inputs.items()
        }
        return f"curl {target} -d {shlex.quote(json.dumps({'inputs': plain}))}"
    # A program makes large arrays, such as images, instead of writing them out.
    tensors = ", ".join(
        f"{name!r}: {_expression(value) if isinstance(value, np.ndarray) else repr(value)}"
        for name, value in inputs.items()
    )
    program = f"import json; print(json.dumps({{'inputs': {{{tensors}}}}}))"
    return f"python3 -c {shlex.quote(program)} | curl {target} -d @-"


def _expression(array: Array) -> str:
    """Return a Python expression of an explicit tensor, for an array of equal numbers."""
    return f"{{'shape': {list(array.shape)}, 'data': [{array.flat[0]!s}] * {array.size}}}"


def sample_inputs(package: Package) -> dict[str, Any]:
    """Return example inputs: a text if that suffices, else the manifest's warm-up inputs.

    Without warm-up inputs, they are made up; numeric inputs are zeros.
    """
    signature = package.signature
    needed = [spec for spec in signature.inputs if not spec.optional]
    for spec in signature.inputs:
        if spec.dtype == "string" and needed in ([], [spec]):
            return {spec.name: SAMPLE_TEXT}
    given = package.manifest.warm_up.inputs
    if given is not None:
        return given
    needed += map(signature.input, signature.one_of[:1])
    return {spec.name: _sample(spec) for spec in needed or signature.inputs[:1]}


def _sample(spec: TensorSpec) -> Any:
    shape = [dim if isinstance(dim, int) else (1 if dim == BATCH else 4) for dim in spec.shape]
    if spec.dtype in NUMERIC:
        return np.zeros(shape, NUMERIC[spec.dtype])
    text = SAMPLE_TEXT if spec.dtype == "string" else _PICTURE
    return np.full(shape, text, dtype=object).tolist()
