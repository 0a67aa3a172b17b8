"""JSON Schemas (draft 2020-12) of a model's requests and answers, derived from its signature.

Every input that a signature accepts is valid by its schema, but not the other way round. A schema
cannot express that lists have equal length, that a free dimension has the same size everywhere,
that `shape` agrees with `data`, how many bytes a text or base64 has, or that bytes are an image or
a sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from inferno.protocol.limits import Limits
from inferno.protocol.requests import Predict
from inferno.protocol.signature import BATCH, MAGIC, Signature, TensorSpec
from inferno.protocol.tasks import Answer, Predictions
from inferno.protocol.tensors import ALIASES, NUMERIC

Schema = dict[str, Any]

#: Largest size of a dimension in a tensor's `shape`.
_MAX_SIZE = 2**31 - 1
_BASE64 = r"^[A-Za-z0-9+/]+={0,2}$"
_BYTES = r"^(data:[^,]*;base64,)?[A-Za-z0-9+/]+={0,2}$"


def request_schema(signature: Signature, limits: Limits) -> Schema:
    """Return the schema of the JSON body of a predict.

    Args:
      signature: signature of the model.
      limits: largest sizes of inputs.
    """
    schema = schema_of(Predict)
    del schema["title"]
    members = schema["properties"]
    members["inputs"] = inputs_schema(signature, limits)
    names = [spec.name for spec in signature.outputs]
    choice = {"type": "array", "items": {"enum": names}, "minItems": 1}
    members["outputs"] |= {"anyOf": [choice, {"type": "null"}]}
    return schema


def inputs_schema(signature: Signature, limits: Limits) -> Schema:
    """Return the schema of the inputs by name; see `request_schema`."""
    schema: Schema = {
        "type": "object",
        "properties": {spec.name: _input(spec, limits) for spec in signature.inputs},
        "required": [spec.name for spec in signature.inputs if not spec.optional],
        "minProperties": 1,
        "additionalProperties": False,
    }
    if signature.one_of:
        schema["oneOf"] = [{"required": [name]} for name in signature.one_of]
    return schema


def response_schema(signature: Signature) -> Schema:
    """Return the schema of a successful predict's answer, with outputs or with predictions."""
    schema = schema_of(Answer)
    schema["properties"]["outputs"] = {
        "type": "object",
        "description": "The requested outputs (default: all).",
        "properties": {spec.name: _output(spec) for spec in signature.outputs},
        "minProperties": 1,
        "additionalProperties": False,
    }
    return {"anyOf": [schema, schema_of(Predictions)]}


def schema_of(kind: Any) -> Schema:
    """Return the schema of a type, with all references inlined."""
    (schema,), parts = msgspec.json.schema_components([kind])

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(one) for one in node]
        if not isinstance(node, dict):
            return node
        rest = {key: inlined(value) for key, value in node.items() if key != "$ref"}
        if "$ref" not in node:
            return rest
        return inlined(parts[node["$ref"].rpartition("/")[2]]) | rest

    found: Schema = inlined(schema)
    return found


def _input(spec: TensorSpec, limits: Limits) -> Schema:
    element = _element(spec, limits)
    full = _nested(spec.shape, element, limits.rows)
    plain = [full]
    if spec.batched:
        plain.insert(0, _nested(spec.shape[1:], element, limits.rows) | {"title": "One row"})
        full["title"] = "Rows"
    explicit = _explicit(spec, element, full, limits.rows)
    return {"description": _about(spec), "anyOf": [*plain, *explicit]}


def _about(spec: TensorSpec) -> str:
    shape = f"`{spec.dtype}` of shape [{', '.join(map(str, spec.shape))}]."
    content = "" if spec.content is None else f" Each holds {spec.content}."
    return f"{spec.description} {shape}{content}" if spec.description else f"{shape}{content}"


def _explicit(spec: TensorSpec, element: Schema, nested: Schema, rows: int) -> list[Schema]:
    """Return the schemas of an explicit tensor: nested lists, one flat list, or base64."""
    dtype = {"enum": _dtype_names(spec.dtype)}
    shape = _shape([_size(dim, rows) for dim in spec.shape])
    members = {"dtype": dtype, "datatype": dtype, "shape": shape, "name": {}, "parameters": {}}

    def form(title: str, required: Sequence[str], **more: Schema) -> Schema:
        return {
            "title": title,
            "type": "object",
            "properties": members | more,
            "required": list(required),
            "additionalProperties": False,
        }

    flat = {"anyOf": [{"type": "array", "items": element, "minItems": 1}, element]}
    forms = [
        form("Tensor of nested lists", ["data"], data=nested),
        form("Tensor of one flat list", ["shape", "data"], data=flat),
    ]
    if spec.dtype in NUMERIC:
        packed = {
            "type": "string",
            "pattern": _BASE64,
            "description": "Little-endian, row-major bytes.",
        }
        forms.append(form("Tensor in base64", ["shape", "base64"], base64=packed))
    return forms


def _dtype_names(dtype: str) -> list[str]:
    names = [dtype, *(alias for alias, name in ALIASES.items() if name == dtype)]
    if dtype == "bytes":
        names.append("BYTES")
    return [*names, *(f"torch.{name}" for name in names if name != "BYTES" or dtype == "string")]


def _size(dim: int | str, rows: int) -> Schema:
    if isinstance(dim, int):
        return {"const": dim}
    most = rows if dim == BATCH else _MAX_SIZE
    return {"type": "integer", "minimum": 1, "maximum": most, "description": dim}


def _shape(sizes: list[Schema]) -> Schema:
    # JSON Schema does not allow an empty `prefixItems`.
    each = {"prefixItems": sizes} if sizes else {}
    return {"type": "array", **each, "minItems": len(sizes), "maxItems": len(sizes)}


def _nested(shape: Sequence[int | str], element: Schema, rows: int) -> Schema:
    """Return the schema of lists nested by a shape."""
    schema = dict(element)
    for dim in reversed(shape):
        schema = {"type": "array", "items": schema}
        if isinstance(dim, int):
            schema |= {"minItems": dim, "maxItems": dim}
        else:
            schema |= {"minItems": 1, "description": dim}
            if dim == BATCH:
                schema["maxItems"] = rows
    return schema


def _element(spec: TensorSpec, limits: Limits) -> Schema:
    """Return the schema of one element of an input."""
    if spec.dtype == "string":
        # A character has at least one byte.
        return {"type": "string", "minLength": 1, "maxLength": limits.text_bytes}
    if spec.dtype == "bytes":
        known = spec.content in MAGIC
        media = f"{spec.content}/*" if known else "application/octet-stream"
        return {
            "type": "string",
            "pattern": _BYTES,
            "contentEncoding": "base64",
            "contentMediaType": media,
        }
    return _number(spec.dtype)


def _number(dtype: str) -> Schema:
    kind = NUMERIC[dtype]
    if kind.kind == "b":
        return {"type": "boolean"}
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}
    if kind.itemsize == 8:
        return {"type": "number"}
    # Numbers up to half a step above the largest one round down to it.
    floats = np.finfo(kind)
    over = float(floats.max) + 2.0 ** (int(floats.maxexp) - int(floats.nmant) - 2)
    return {"type": "number", "exclusiveMinimum": -over, "exclusiveMaximum": over}


def _output(spec: TensorSpec) -> Schema:
    element: Mapping[str, Any] = (
        {"type": "string"} if spec.dtype in ("string", "bytes") else _number(spec.dtype)
    )
    data: Schema = dict(element)
    sizes: list[Schema] = []
    for dim in reversed(spec.shape):
        data = {"type": "array", "items": data}
        fixed = isinstance(dim, int)
        data |= {"minItems": dim, "maxItems": dim} if fixed else {"description": dim}
        size = {"const": dim} if fixed else {"type": "integer", "minimum": 0, "description": dim}
        sizes.insert(0, size)
    shape = _shape(sizes)
    schema: Schema = {
        "type": "object",
        "description": _about(spec),
        "properties": {"dtype": {"const": spec.dtype}, "shape": shape, "data": data},
        "required": ["dtype", "shape"],
        "additionalProperties": False,
    }
    if spec.dtype not in NUMERIC:
        schema["required"].append("data")
        return schema
    schema["properties"]["base64"] = {"type": "string"}
    return schema | {"oneOf": [{"required": ["data"]}, {"required": ["base64"]}]}
