"""What a client sends: a request, and its inputs as JSON.

The first step of a task's way, *submit*, seen from outside. Text and numbers become JSON, images
and numeric arrays base64.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferno.errors import InvalidRequest, ModelNotFound
from inferno.protocol import tensors
from inferno.protocol.signature import Signature, TensorSpec
from inferno.protocol.tensors import NUMERIC, Array

#: Fetches a model's signature by the model's name. Raises ModelNotFound.
Signatures = Callable[[str], Signature]


@dataclass(frozen=True)
class Request:
    """One inference to run."""

    model: str
    #: Values by input name: text, bytes (an image), a number, a list of these, or a numpy array.
    #: A single value without a name goes to the input that can hold it.
    inputs: Any
    version: int | None = None
    #: Outputs to return; None for all.
    outputs: list[str] | None = None
    #: 0 to 9; higher runs sooner.
    priority: int = 0
    #: The forward pass must start within this many milliseconds.
    timeout_ms: float | None = None
    #: Only for `stream`: requests with the same key make one task.
    idempotency_key: str | None = None
    #: URL to call about the task.
    webhook: str | None = None
    #: Events to call it for, `start` or `completed`; None for `completed` only.
    webhook_events: list[str] | None = None
    #: Whether a kept or shared result of equal inputs may answer it.
    cache: bool = True

    def options(self) -> dict[str, Any]:
        """Return the fields of the body that differ from their defaults."""
        options: dict[str, Any] = {
            "version": self.version,
            "outputs": self.outputs,
            "priority": self.priority or None,
            "timeout_ms": self.timeout_ms,
            "webhook": self.webhook,
            "webhook_events": self.webhook_events,
            "cache": None if self.cache else False,
        }
        return {name: value for name, value in options.items() if value is not None}


def encode_request(request: Request, signatures: Signatures) -> dict[str, Any]:
    """Return the body of a submit.

    Args:
      request: its numeric arrays are converted to what the model declares.
      signatures: only called when the request has numeric arrays.
    """
    inputs = request.inputs
    if isinstance(inputs, np.ndarray):
        inputs = name_inputs(request.model, inputs, signatures)
    if isinstance(inputs, Mapping):
        wire: Any = {
            name: _encode_input(request.model, name, value, signatures)
            for name, value in inputs.items()
        }
    else:
        wire = _plain(inputs)
    body = {"model": request.model, "inputs": wire}
    if isinstance(inputs, bytes):
        body["input_type"] = "image"
    return body | request.options()


def name_inputs(model: str, inputs: Any, signatures: Signatures) -> Mapping[str, Any]:
    """Return inputs by name; a single value goes to the input that can hold it."""
    if isinstance(inputs, Mapping):
        return inputs
    kind = "image" if isinstance(inputs, bytes) else None
    return {name: inputs for name in signatures(model).assign(_plain(inputs), kind)}


def key_header(key: str | None) -> dict[str, str]:
    """Write an idempotency key as a string of a structured header field (RFC 8941).

    Raises:
      InvalidRequest: the key is not printable ASCII.
    """
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest(f"expected printable ASCII, got {key!r}", "idempotency_key")
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return {"Idempotency-Key": f'"{escaped}"'}


def _encode_input(model: str, name: str, value: Any, signatures: Signatures) -> Any:
    """Encode one input, numeric arrays as base64 in the dtype that the model declares."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        return _plain(value)
    # A value that does not fit is sent unchanged: the platform's message explains it best.
    with suppress(ModelNotFound):
        for spec in signatures(model).inputs:
            if spec.name == name:
                value = _conformed(value, spec)
    return tensors.encode(value, value.dtype.name, "base64")


def _conformed(array: Array, spec: TensorSpec) -> Array:
    """Convert an array to an input's dtype, and add the batch dimension to a single row.

    Floats may be rounded; integers are only converted when every value stays the same.
    """
    dtype = NUMERIC.get(spec.dtype)
    if dtype is not None and np.can_cast(array.dtype, dtype, "same_kind"):
        converted = array.astype(dtype)
        if dtype.kind == "f" or np.array_equal(converted, array):
            array = converted
    is_one_row = spec.batched and array.ndim == len(spec.shape) - 1
    return array[np.newaxis] if is_one_row else array


def _plain(value: Any) -> Any:
    """Convert one input to JSON types."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
