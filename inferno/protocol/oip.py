"""The Open Inference Protocol, version 2: requests and answers in JSON and in binary.

KServe defines the protocol, https://github.com/kserve/open-inference-protocol. Triton's extensions
for binary tensors, classification, schedule policy and generation are included.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import orjson

from inferno.errors import InvalidField, InvalidRequest
from inferno.protocol import tensors
from inferno.protocol.decoding import decode
from inferno.protocol.limits import Limits
from inferno.protocol.requests import MAX_PRIORITY, InferRequest
from inferno.protocol.signature import Signature

#: Header with the number of bytes of the body's JSON; the binary tensors follow the JSON.
HEADER_LENGTH = "Inference-Header-Content-Length"

EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "generate",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
]

#: Request parameters that are not supported.
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


class InputTensor(msgspec.Struct, frozen=True):
    """One input."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    #: Nested or flat lists; unset for a binary tensor.
    data: Any = msgspec.UNSET


class RequestedOutput(msgspec.Struct, frozen=True):
    """One requested output."""

    name: str
    parameters: dict[str, Any] = {}


class InferenceRequest(msgspec.Struct, frozen=True):
    """The JSON of a request."""

    inputs: list[InputTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[RequestedOutput] | None = None


class GenerateRequest(msgspec.Struct, frozen=True):
    """The JSON of a generate request."""

    text_input: str
    id: str = ""
    parameters: dict[str, Any] = {}


class LoadRequest(msgspec.Struct, frozen=True):
    """The JSON of a request to load or unload a model."""

    parameters: dict[str, Any] = {}


class IndexRequest(msgspec.Struct, frozen=True):
    """The JSON of a request for the index of the repository."""

    ready: bool = False


@dataclass(frozen=True)
class Form:
    """The form of the answer that a client requests."""

    id: str
    #: Outputs to send in binary; None for all.
    binary: frozenset[str] | None
    #: Number of best classes to return instead of the numbers, by output.
    classes: Mapping[str, int]

    def is_binary(self, output: str) -> bool:
        """Return whether to send an output in binary."""
        return self.binary is None or output in self.binary


def parse_infer(
    body: bytes, header_length: str | None, model: str, version: int | None, limits: Limits
) -> tuple[InferRequest, Form]:
    """Read an inference request.

    Args:
      body: JSON, followed by the bytes of the binary inputs.
      header_length: the `HEADER_LENGTH` header; None when the body is only JSON.
      model: name of the model in the path.
      version: model version in the path, if any.
      limits: maximum sizes of the JSON.
    Returns:
      The request, and the form of its answer.
    Raises:
      InvalidRequest: the request does not follow the protocol; names the field.
    """
    size = _header_length(header_length, len(body))
    given = decode(body[:size] if size < len(body) else body, InferenceRequest, limits)
    if not given.inputs:
        raise InvalidField("expected at least one input", "inputs")
    inputs = _inputs(given.inputs, memoryview(body)[size:])
    form = _form(given)
    request = InferRequest(
        inputs,
        model,
        version,
        None if given.outputs is None else [output.name for output in given.outputs],
        _priority(given.parameters),
        _timeout_ms(given.parameters),
        # base64 saves writing numbers as text when the answer sends them in binary.
        "base64" if form.binary is None or form.binary or form.classes else "json",
    )
    for name in _SEQUENCE:
        if given.parameters.get(name):
            raise InvalidField("sequences of requests are not supported", f"parameters.{name}")
    return request, form


def _header_length(text: str | None, body_bytes: int) -> int:
    if text is None:
        return body_bytes
    # Python refuses to parse numbers of several thousand digits.
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) > body_bytes:
        raise InvalidRequest(
            f"{HEADER_LENGTH}: expected at most the body's {body_bytes} bytes, got {text!r:.40}"
        )
    return int(text)


def _inputs(given: Sequence[InputTensor], binary: memoryview) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    at = 0
    for tensor in given:
        field = f"inputs.{tensor.name}"
        if tensor.name in inputs:
            raise InvalidField("the input is given twice", field)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            if tensor.data is msgspec.UNSET:
                raise InvalidField("expected data, or binary_data_size in its parameters", field)
            inputs[tensor.name] = {
                "datatype": tensor.datatype,
                "shape": tensor.shape,
                "data": tensor.data,
            }
            continue
        if tensor.data is not msgspec.UNSET:
            raise InvalidField("expected either data or binary_data_size, not both", field)
        if type(size) is not int or not 0 <= size <= len(binary) - at:
            raise InvalidField(
                f"binary_data_size is {size!r:.40}, but {len(binary) - at} bytes are left", field
            )
        inputs[tensor.name] = tensors.Raw(tensor.datatype, tensor.shape, binary[at : at + size])
        at += size
    if at < len(binary):
        raise InvalidRequest(f"{len(binary) - at} bytes of binary data belong to no input")
    return inputs


def _form(given: InferenceRequest) -> Form:
    by_default = _flag(given.parameters, "binary_data_output", "parameters")
    binary, classes = set(), {}
    for output in given.outputs or ():
        field = f"outputs.{output.name}.parameters"
        chosen = output.parameters.get("binary_data")
        if by_default if chosen is None else _flag(output.parameters, "binary_data", field):
            binary.add(output.name)
        if (count := output.parameters.get("classification")) is not None:
            if type(count) is not int or count < 1:
                raise InvalidField(
                    f"expected a number of classes, got {count!r:.40}", f"{field}.classification"
                )
            classes[output.name] = count
    everything = by_default and given.outputs is None
    return Form(given.id, None if everything else frozenset(binary), classes)


def _flag(parameters: Mapping[str, Any], name: str, field: str) -> bool:
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise InvalidField(f"expected true or false, got {value!r:.40}", f"{field}.{name}")
    return value


def _priority(parameters: Mapping[str, Any]) -> int:
    """Convert a priority of the protocol, where 1 is the most urgent and 0 the default."""
    given = parameters.get("priority", 0)
    if type(given) is not int or given < 0:
        raise InvalidField(f"expected a number from 0, got {given!r:.40}", "parameters.priority")
    return max(MAX_PRIORITY + 1 - given, 0) if given else 0


def _timeout_ms(parameters: Mapping[str, Any]) -> float | None:
    given = parameters.get("timeout", 0)
    if type(given) is not int or not 0 <= given <= 86_400_000_000:
        raise InvalidField(
            f"expected microseconds, at most one day, got {given!r:.40}", "parameters.timeout"
        )
    return given / 1000 or None


# -- Answers ---------------------------------------------------------------------------------------


class _Tensor(msgspec.Struct):
    """One output of a stored result; see `inferno.protocol.tensors`."""

    dtype: str
    shape: list[int]
    data: msgspec.Raw = msgspec.Raw()
    #: msgspec decodes it in a fifth of the time that Python's base64 module takes.
    base64: bytes | None = None


class _Result(msgspec.Struct):
    """The fields of a stored result that answers need."""

    model: str
    version: int
    outputs: dict[str, _Tensor]
    cached: bool = False


_decode_result = msgspec.json.Decoder(_Result).decode
_encode = msgspec.json.Encoder().encode


def write_infer(
    result: bytes, task_id: str, form: Form, labels: Sequence[str]
) -> tuple[bytes, int | None]:
    """Write the answer to an inference request.

    Args:
      result: the stored result.
      task_id: id of the task.
      form: form of the answer that the client requests.
      labels: names of the model's classes.
    Returns:
      The body, and the number of its bytes that are JSON; None without binary outputs.
    Raises:
      InvalidField: the client requests classes of an output that is not numeric.
    """
    given = _decode_result(result)
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, stored in given.outputs.items():
        tensor = _requested(name, stored, form, labels)
        entry: dict[str, Any] = {
            "name": name,
            "datatype": tensors.DATATYPES[tensor.dtype],
            "shape": tensor.shape,
        }
        if form.is_binary(name):
            raw = _bytes(tensor)
            entry["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
        elif tensor.base64 is None:
            entry["data"] = tensor.data
        else:
            entry["data"] = _numbers(_array(tensor))
        outputs.append(entry)
    document: dict[str, Any] = {
        "model_name": given.model,
        "model_version": str(given.version),
        "outputs": outputs,
        "parameters": {"task_id": task_id} | ({"cached": True} if given.cached else {}),
    }
    if form.id:
        document["id"] = form.id
    head = _encode(document)
    if not binary:
        return head, None
    return b"".join([head, *binary]), len(head)


def _requested(name: str, tensor: _Tensor, form: Form, labels: Sequence[str]) -> _Tensor:
    """Return an output, or its best classes if the client requests these."""
    count = form.classes.get(name)
    if count is None:
        return tensor
    if tensor.dtype not in tensors.NUMERIC:
        raise InvalidField(
            f"expected a numeric output, but its dtype is {tensor.dtype}",
            f"outputs.{name}.parameters.classification",
        )
    return _classified(_array(tensor), count, labels)


def write_generate(result: bytes, task_id: str, request_id: str) -> dict[str, Any]:
    """Return the answer to a generate request."""
    given = _decode_result(result)
    (tensor,) = given.outputs.values()
    (text,) = _flat(msgspec.json.decode(tensor.data))
    document = {
        "model_name": given.model,
        "model_version": str(given.version),
        "text_output": text,
        "parameters": {"task_id": task_id},
    }
    return document | ({"id": request_id} if request_id else {})


def _array(tensor: _Tensor) -> tensors.Array:
    dtype = tensors.NUMERIC[tensor.dtype]
    if tensor.base64 is not None:
        return np.frombuffer(tensor.base64, dtype).reshape(tensor.shape)
    return np.array(msgspec.json.decode(tensor.data), dtype).reshape(tensor.shape)


def _numbers(array: tensors.Array) -> msgspec.Raw:
    # Unlike msgspec, orjson writes arrays, and float32 in its shortest form.
    return msgspec.Raw(orjson.dumps(array.ravel(), option=orjson.OPT_SERIALIZE_NUMPY))


def _bytes(tensor: _Tensor) -> bytes:
    if tensor.base64 is not None:
        return tensor.base64
    if tensor.dtype in tensors.NUMERIC:
        return _array(tensor).tobytes()
    texts = _flat(msgspec.json.decode(tensor.data))
    if tensor.dtype == "string":
        return tensors.framed(text.encode() for text in texts)
    return tensors.framed(map(base64.b64decode, texts))


def _flat(nested: Any) -> Iterable[str]:
    if isinstance(nested, str):
        yield nested
    else:
        for item in nested:
            yield from _flat(item)


def _classified(scores: tensors.Array, count: int, labels: Sequence[str]) -> _Tensor:
    """Return the best classes of each row, as `score:index` or `score:index:label`."""
    rows = scores.reshape(len(scores), -1) if scores.ndim > 1 else scores.reshape(1, -1)
    count = min(count, rows.shape[1])
    # Of equal scores, the lower index comes first.
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]

    # The number formats of Triton.
    written = "f" if rows.dtype.kind == "f" else "d"

    def described(row: int, index: int) -> str:
        label = f":{labels[index]}" if index < len(labels) else ""
        return f"{rows[row, index]:{written}}:{index}{label}"

    texts = [[described(row, index) for index in indices] for row, indices in enumerate(best)]
    shape = [len(rows), count] if scores.ndim > 1 else [count]
    data = texts if scores.ndim > 1 else texts[0]
    return _Tensor("string", shape, data=msgspec.Raw(_encode(data)))


def texts_of(signature: Signature) -> tuple[str, str] | None:
    """Return the names of the input and the output of a text-to-text model; None for others."""
    inputs, outputs = signature.inputs, signature.outputs
    if len(inputs) != 1 or len(outputs) != 1 or {inputs[0].dtype, outputs[0].dtype} != {"string"}:
        return None
    return inputs[0].name, outputs[0].name
