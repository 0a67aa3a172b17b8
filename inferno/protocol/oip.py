"""The Open Inference Protocol, version 2: its requests and answers, in JSON and in binary.

The protocol is that of KServe, https://github.com/kserve/open-inference-protocol, with Triton's
extensions for binary tensors, classification, schedule policy and generation.
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
from inferno.protocol.requests import MAX_PRIORITY, InferRequest
from inferno.protocol.signature import Signature

#: Says how many bytes of a body are its JSON; what follows are the binary tensors.
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

#: Of `priority`, `timeout` and the like, those that ask for what is not there.
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


class InputTensor(msgspec.Struct, frozen=True):
    """One input."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    #: Nested or flat; not there where it is binary.
    data: Any = msgspec.UNSET


class RequestedOutput(msgspec.Struct, frozen=True):
    """One output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferenceRequest(msgspec.Struct, frozen=True):
    """The JSON of a request."""

    inputs: list[InputTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[RequestedOutput] | None = None


class GenerateRequest(msgspec.Struct, frozen=True):
    """The JSON of a request for a text."""

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
    """How an answer is to be written."""

    id: str
    #: The outputs that are written in binary; None for all of them.
    binary: frozenset[str] | None
    #: Outputs whose so many best classes are answered, in place of the numbers.
    classes: Mapping[str, int]

    def is_binary(self, output: str) -> bool:
        """Return whether an output is written in binary."""
        return self.binary is None or output in self.binary


def parse_infer(
    body: bytes, header_length: str | None, model: str, version: int | None
) -> tuple[InferRequest, Form]:
    """Read a request for an inference.

    Args:
      body: JSON, and the bytes of the binary inputs behind it.
      header_length: the header of this name: how much of it is JSON; None for all of it.
      model: that the path names.
      version: that the path names, if it does.
    Returns:
      the request, and how its answer is to be written.
    Raises:
      InvalidRequest: it is not of the protocol's form; names the field.
    """
    size = _header_length(header_length, len(body))
    given = decode(body[:size] if size < len(body) else body, InferenceRequest)
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
        # Numbers that are not needed as text never become text.
        "base64" if form.binary is None or form.binary or form.classes else "json",
    )
    for name in _SEQUENCE:
        if given.parameters.get(name):
            raise InvalidField("sequences of requests are not supported", f"parameters.{name}")
    return request, form


def _header_length(text: str | None, body_bytes: int) -> int:
    if text is None:
        return body_bytes
    # Python reads no number of more than some thousand digits.
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
            raise InvalidField("it is given twice", field)
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
            raise InvalidField("expected either data or binary_data_size, and not both", field)
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
        wanted = output.parameters.get("binary_data")
        if by_default if wanted is None else _flag(output.parameters, "binary_data", field):
            binary.add(output.name)
        if (count := output.parameters.get("classification")) is not None:
            if type(count) is not int or count < 1:
                raise InvalidField(
                    f"expected how many classes, got {count!r:.40}", f"{field}.classification"
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
    """Return the priority in our sense: here, 0 is the default and 1 the most urgent."""
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
    #: Decoded, which takes a fifth of the time that Python's own module takes.
    base64: bytes | None = None


class _Result(msgspec.Struct):
    """What is needed of a stored result."""

    model: str
    version: int
    outputs: dict[str, _Tensor]
    cached: bool = False


_decode_result = msgspec.json.Decoder(_Result).decode
_encode = msgspec.json.Encoder().encode


def write_infer(
    result: bytes, task_id: str, form: Form, labels: Sequence[str]
) -> tuple[bytes, int | None]:
    """Write the answer to an inference.

    Args:
      result: as it was stored.
      task_id: of the task.
      form: as the client wants it.
      labels: of the model's classes.
    Returns:
      the body, and how many bytes of it are JSON where binary outputs follow.
    Raises:
      InvalidField: classes of an output are asked for that has no numbers.
    """
    given = _decode_result(result)
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, tensor in given.outputs.items():
        if (count := form.classes.get(name)) is not None:
            if tensor.dtype not in tensors.NUMERIC:
                raise InvalidField(
                    f"expected an output of numbers, and this is {tensor.dtype}",
                    f"outputs.{name}.parameters.classification",
                )
            tensor = _classified(_array(tensor), count, labels)
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


def write_generate(result: bytes, task_id: str, request_id: str) -> dict[str, Any]:
    """Return the answer to a request for a text."""
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
    # orjson writes arrays, and float32 in its shortest form, which msgspec does not.
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
    # Of equal scores, the lower index is first.
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]

    # As Triton writes them.
    written = "f" if rows.dtype.kind == "f" else "d"

    def described(row: int, index: int) -> str:
        label = f":{labels[index]}" if index < len(labels) else ""
        return f"{rows[row, index]:{written}}:{index}{label}"

    texts = [[described(row, index) for index in indices] for row, indices in enumerate(best)]
    shape = [len(rows), count] if scores.ndim > 1 else [count]
    data = texts if scores.ndim > 1 else texts[0]
    return _Tensor("string", shape, data=msgspec.Raw(_encode(data)))


def texts_of(signature: Signature) -> tuple[str, str] | None:
    """Return the names of the input and the output of a model that makes a text of a text."""
    inputs, outputs = signature.inputs, signature.outputs
    if len(inputs) != 1 or len(outputs) != 1 or {inputs[0].dtype, outputs[0].dtype} != {"string"}:
        return None
    return inputs[0].name, outputs[0].name
