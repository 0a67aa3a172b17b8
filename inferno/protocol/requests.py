"""Request bodies of submit and predict, in every form that clients send.

    {"model", "inputs"}                           the native form
    {"model_name", "input_type", "payload"}       names the kind of the payload
    {"model_id", "input"}                         the shortest form

Step *submit*: the web tier turns all of them into one `InferRequest`. A body may also be the input
itself, an image or the bytes of a tensor; the query of the URL then holds the other fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inferno.errors import InvalidField
from inferno.protocol.decoding import convert_query, decode, explain
from inferno.protocol.limits import Limits
from inferno.protocol.signature import Signature
from inferno.protocol.tensors import MAX_DIMENSIONS, Binary, Tensors
from inferno.protocol.webhooks import DEFAULT_EVENTS, MAX_URL, parse_address

#: Range of priorities; a higher one runs sooner.
MIN_PRIORITY, MAX_PRIORITY = 0, 9
#: Longest deadline of a task, in milliseconds: one day.
MAX_TIMEOUT_MS = 86_400_000

_MISSING: Any = msgspec.UNSET

# Fields of bodies with their constraints. msgspec checks them, the OpenAPI document shows them.

Version = Annotated[
    int | None, Meta(description="Model version (default: the active one).", examples=[1])
]
Outputs = Annotated[
    list[str] | None, Meta(description="Names of the outputs to return (default: all).")
]
Priority = Annotated[
    int, Meta(ge=MIN_PRIORITY, le=MAX_PRIORITY, description="0 to 9; higher runs sooner.")
]
TimeoutMs = Annotated[
    Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_MS)] | None,
    Meta(
        description="The forward pass must start within this many milliseconds.", examples=[30_000]
    ),
]
Codec = Annotated[
    Literal["json", "base64"] | None,
    Meta(description="Encoding of numeric outputs (default: set by the model's package)."),
]
InputType = Annotated[
    Literal["text", "image", "audio"] | None,
    Meta(description="Kind of input that a plain value is for."),
]
Webhook = Annotated[
    str | None,
    Meta(
        description="URL to call about the task.",
        extra_json_schema={"format": "uri", "maxLength": MAX_URL},
    ),
]
Events = Annotated[
    Annotated[list[Literal["start", "completed"]], Meta(min_length=1)] | None,
    Meta(description="Events to call the webhook for (default: `completed`)."),
]
SameEvents = Annotated[
    Annotated[list[Literal["start", "completed"]], Meta(min_length=1)] | None,
    Meta(description="Alias of `webhook_events`."),
]
UseCache = Annotated[
    bool, Meta(description="Whether a kept or shared result of equal inputs may answer.")
]


class InferRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One inference as a client requests it, not yet checked against the model's signature."""

    #: Inputs by name, or one plain value for the input that can hold it; instances if
    #: `by_instance`.
    inputs: Any
    model: str = ""
    version: int | None = None
    #: Outputs to return; None for all.
    outputs: list[str] | None = None
    #: 0 to 9; higher runs sooner.
    priority: int = 0
    #: The forward pass must start within this many milliseconds.
    timeout_ms: float | None = None
    #: Encoding of numeric outputs, `json` or `base64`; None for the default of the package.
    codec: str | None = None
    #: Kind of input that a plain value is for: `text`, `image` or `audio`.
    input_type: str | None = None
    #: URL to call about the task.
    webhook: str | None = None
    #: Events to call the webhook for, from `webhooks.EVENTS`, each once. None without a webhook.
    webhook_events: list[str] | None = None
    #: Whether a kept or shared result of equal inputs may answer.
    cache: bool = True
    #: Requests with the same key get the same version when several versions are active.
    sticky: str | None = None
    #: Whether the request has `instances` and its answer `predictions` (KServe's V1).
    by_instance: bool = False

    def arrays(self, signature: Signature, limits: Limits) -> Tensors:
        """Validate against a model's signature.

        Returns:
          The inputs as arrays by name.
        Raises:
          InvalidInput: an input or the selection of outputs is wrong; names the field.
        """
        if self.outputs is not None:
            signature.check_outputs(self.outputs)
        return signature.parse(self._named(signature, limits), limits)

    def _named(self, signature: Signature, limits: Limits) -> Mapping[str, Any]:
        inputs = _columns(self.inputs, limits) if self.by_instance else self.inputs
        return inputs if isinstance(inputs, dict) else signature.assign(inputs, self.input_type)


class SubmitBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a submit. `model` and `inputs` also have the names of other servers."""

    inputs: Annotated[
        Any,
        Meta(
            description="Inputs by name, or one plain value for the input that can hold it.",
            examples=[{"text": "What a lovely day!"}],
        ),
    ] = _MISSING
    payload: Annotated[Any, Meta(description="Alias of `inputs`.")] = _MISSING
    input: Annotated[Any, Meta(description="Alias of `inputs`.")] = _MISSING
    model: Annotated[str, Meta(description="Name of the model.")] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    model_name: Annotated[str, Meta(description="Alias of `model`.")] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    model_id: Annotated[str, Meta(description="Alias of `model`.")] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    version: Version = None
    outputs: Outputs = None
    priority: Priority = 0
    timeout_ms: TimeoutMs = None
    codec: Codec = None
    input_type: InputType = None
    webhook: Webhook = None
    webhook_events: Events = None
    webhook_events_filter: SameEvents = None
    cache: UseCache = True


def _exactly_one(*names: str) -> dict[str, Any]:
    return {"oneOf": [{"required": [name]} for name in names]}


#: `SubmitBody` with the constraints that `_unify` checks.
Submit = Annotated[
    SubmitBody,
    Meta(
        extra_json_schema={
            "allOf": [
                _exactly_one("inputs", "payload", "input"),
                _exactly_one("model", "model_name", "model_id"),
            ]
        }
    ),
]


class PredictBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a predict. The path names the model."""

    inputs: Annotated[dict[str, Any], Meta(description="Inputs by name.")] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    instances: (
        Annotated[
            list[Any],
            Meta(
                min_length=1,
                description="One item for each row, instead of `inputs` (KServe's V1).",
            ),
        ]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    version: Version = None
    outputs: Outputs = None
    priority: Priority = 0
    timeout_ms: TimeoutMs = None
    codec: Codec = None
    webhook: Webhook = None
    webhook_events: Events = None
    webhook_events_filter: SameEvents = None
    cache: UseCache = True


Predict = Annotated[PredictBody, Meta(extra_json_schema=_exactly_one("inputs", "instances"))]

_SHAPE = rf"^[0-9]{{1,9}}(,[0-9]{{1,9}}){{0,{MAX_DIMENSIONS - 1}}}$"


class BinaryPredictQuery(msgspec.Struct, forbid_unknown_fields=True):
    """URL parameters of a predict whose body is the input itself."""

    input: Annotated[
        str | None,
        Meta(description="Name of the input; optional if only one input can hold the body."),
    ] = None
    shape: Annotated[
        Annotated[str, Meta(pattern=_SHAPE)] | None,
        Meta(
            description="Shape of a numeric tensor: sizes separated by commas.",
            examples=["1,3,8,8"],
        ),
    ] = None
    version: Version = None
    outputs: Annotated[
        str | None,
        Meta(description="Names of the outputs to return, separated by commas (default: all)."),
    ] = None
    priority: Priority = 0
    timeout_ms: TimeoutMs = None
    codec: Codec = None


class BinarySubmitQuery(BinaryPredictQuery, forbid_unknown_fields=True, kw_only=True):
    """URL parameters of a submit whose body is the input itself."""

    model: Annotated[str, Meta(description="Name of the model.")]


#: Content types of a body that is the input itself.
_BINARY = re.compile(
    r"\s*(?:application/octet-stream|(?:image|audio)/[^;\s]+)\s*(?:;|$)", re.IGNORECASE
)


def is_binary(content_type: str | None) -> bool:
    """Return whether a body of this content type is the input itself; see `parse_binary`."""
    return content_type is not None and _BINARY.match(content_type) is not None


def parse_submit(body: bytes, limits: Limits) -> InferRequest:
    """Read the body of a submit.

    Args:
      body: the bytes of the body.
      limits: maximum sizes of its JSON.
    Raises:
      InvalidRequest: the body is not a JSON object of the documented form; names the field.
    """
    return _unify(decode(body, SubmitBody, limits))


def convert_submit(message: Mapping[str, Any]) -> InferRequest:
    """Read a submit that is part of a larger JSON message.

    Raises:
      InvalidRequest: as `parse_submit`.
    """
    try:
        return _unify(msgspec.convert(message, SubmitBody))
    except msgspec.ValidationError as exc:
        raise explain(exc, SubmitBody) from None


def parse_predict(body: bytes, model: str, limits: Limits) -> InferRequest:
    """Read the body of a predict.

    Args:
      body: the bytes of the body.
      model: name of the model in the path.
      limits: maximum sizes of its JSON.
    Raises:
      InvalidRequest: the body is not a JSON object of the documented form; names the field.
    """
    given = decode(body, PredictBody, limits)
    by_instance = given.instances is not msgspec.UNSET
    if by_instance == (given.inputs is not msgspec.UNSET):
        raise InvalidField("expected either inputs, by name, or instances, by row", "inputs")
    return InferRequest(
        given.instances if by_instance else given.inputs,
        model,
        given.version,
        given.outputs,
        given.priority,
        given.timeout_ms,
        "json" if by_instance else given.codec,
        None,
        given.webhook,
        _events(given),
        given.cache,
        by_instance=by_instance,
    )


def _columns(instances: Any, limits: Limits) -> Any:
    """Turn instances (rows) into inputs by name, or into one plain value (a list of rows)."""
    if len(instances) > limits.rows:
        raise InvalidField(
            f"expected at most {limits.rows} rows, got {len(instances)}", "instances"
        )
    rows = [_decoded(row) for row in instances]
    if not any(isinstance(row, dict) for row in rows):
        return rows
    names = rows[0].keys() if isinstance(rows[0], dict) else None
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != names:
            raise InvalidField(
                "expected an object with the same inputs as in the first instance",
                f"instances[{at}]",
            )
    return {name: [_decoded(row[name]) for row in rows] for name in rows[0]}


def _decoded(value: Any) -> Any:
    """Return the base64 text of `{"b64": "..."}`; any other value unchanged."""
    if isinstance(value, dict) and value.keys() == {"b64"}:
        return value["b64"]
    return value


def parse_binary(body: bytes, query: Mapping[str, str], model: str | None = None) -> InferRequest:
    """Read a request whose body is the input itself.

    Args:
      body: an element of a `bytes` tensor, or a numeric tensor's little-endian, row-major bytes.
      query: the parameters of the URL.
      model: name of the model in the path; None when the query names it.
    Raises:
      InvalidRequest: a parameter is wrong; names the parameter.
    """
    if model is not None and "model" in query:
        raise InvalidField("the path already names the model", "model")
    kind = BinarySubmitQuery if model is None else BinaryPredictQuery
    given: BinaryPredictQuery = convert_query(query, kind)
    shape = None if given.shape is None else tuple(map(int, given.shape.split(",")))
    value = Binary(body, shape)
    return InferRequest(
        value if given.input is None else {given.input: value},
        given.model if isinstance(given, BinarySubmitQuery) else str(model),
        given.version,
        None if given.outputs is None else given.outputs.split(","),
        given.priority,
        given.timeout_ms,
        given.codec,
    )


def _unify(body: SubmitBody) -> InferRequest:
    return InferRequest(
        _one_of(body, "inputs", "payload", "input"),
        _one_of(body, "model", "model_name", "model_id"),
        body.version,
        body.outputs,
        body.priority,
        body.timeout_ms,
        body.codec,
        body.input_type,
        body.webhook,
        _events(body),
        body.cache,
    )


def _events(body: SubmitBody | PredictBody) -> list[str] | None:
    """Check a body's webhook and return the events to call it for."""
    events: list[Any] | None = body.webhook_events
    field = "webhook_events"
    if body.webhook_events_filter is not None:
        field = "webhook_events_filter"
        if events is not None:
            raise InvalidField(f"webhook_events and {field} mean the same; give one of them", field)
        events = body.webhook_events_filter
    if body.webhook is None:
        if events is not None:
            raise InvalidField(f"{field} needs a webhook; give its URL", field)
        return None
    parse_address(body.webhook)
    return list(DEFAULT_EVENTS if events is None else dict.fromkeys(events))


def _one_of(body: SubmitBody, *names: str) -> Any:
    given = [name for name in names if getattr(body, name) is not msgspec.UNSET]
    if not given:
        raise InvalidField(f"missing field {names[0]!r}", names[0])
    if len(given) > 1:
        raise InvalidField(f"{given[0]} and {given[1]} mean the same; give one of them", given[1])
    return getattr(body, given[0])
