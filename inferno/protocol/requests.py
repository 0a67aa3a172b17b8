"""The bodies of submit and predict, in every form that clients send.

    {"model", "inputs"}                           the native body
    {"model_name", "input_type", "payload"}       a form that says what the payload is
    {"model_id", "input"}                         the shortest form

All become one `InferRequest`, as does a body that is one input itself: an image, or the bytes of a
tensor. The query of the URL says the rest then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from inferno.errors import InvalidField, InvalidRequest
from inferno.protocol.signature import Limits, Signature
from inferno.protocol.tensors import MAX_DIMENSIONS, Binary, Tensors
from inferno.protocol.webhooks import DEFAULT_EVENTS, EVENTS, parse_address

#: S0's range: higher is sooner.
MIN_PRIORITY, MAX_PRIORITY = 0, 9

_MISSING: Any = msgspec.UNSET


class InferRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One inference as a client asks for it, not yet checked against the model's signature."""

    #: Named inputs, or one plain value for the input that can hold it.
    inputs: Any
    model: str = ""
    version: int | None = None
    #: Outputs to return; default all.
    outputs: list[str] | None = None
    #: 0 to 9; higher is sooner.
    priority: int = 0
    #: The forward pass must start within this many milliseconds.
    timeout_ms: float | None = None
    #: How numeric outputs are written: `json` or `base64`; default as the model's package says.
    codec: str | None = None
    #: `text`, `image` or `audio`: which input a plain value is meant for.
    input_type: str | None = None
    #: URL that is told of the task.
    webhook: str | None = None
    #: What it is told of: keys of `webhooks.EVENTS`, each once. None without a webhook.
    webhook_events: list[str] | None = None
    #: Whether the result of another task with equal inputs will do.
    cache: bool = True
    #: Requests with the same key get the same version, where several share the work.
    sticky: str | None = None
    #: It came as `instances`, and is answered with `predictions`.
    by_instance: bool = False

    def arrays(self, signature: Signature, limits: Limits) -> Tensors:
        """Validate against a model's signature.

        Returns:
          The inputs as arrays by name.
        Raises:
          InvalidInput: names the field and the expectation.
        """
        if self.outputs is not None:
            signature.check_outputs(self.outputs)
        return signature.parse(self._named(signature), limits)

    def _named(self, signature: Signature) -> Mapping[str, Any]:
        if isinstance(self.inputs, dict):
            return self.inputs
        return signature.assign(self.inputs, self.input_type)


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """Everything that a body may say; `_unify` refuses contradictions."""

    inputs: Any = _MISSING
    payload: Any = _MISSING
    input: Any = _MISSING
    model: str | msgspec.UnsetType = msgspec.UNSET
    model_name: str | msgspec.UnsetType = msgspec.UNSET
    model_id: str | msgspec.UnsetType = msgspec.UNSET
    version: int | None = None
    outputs: list[str] | None = None
    priority: int = 0
    timeout_ms: float | None = None
    codec: str | None = None
    input_type: str | None = None
    webhook: str | None = None
    webhook_events: list[str] | None = None
    webhook_events_filter: list[str] | None = None
    cache: bool = True


class _PredictBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a predict; the path names the model."""

    inputs: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    #: One item for each row, in place of `inputs`: KServe's form.
    instances: list[Any] | msgspec.UnsetType = msgspec.UNSET
    version: int | None = None
    outputs: list[str] | None = None
    priority: int = 0
    timeout_ms: float | None = None
    codec: str | None = None
    webhook: str | None = None
    webhook_events: list[str] | None = None
    webhook_events_filter: list[str] | None = None
    cache: bool = True


class _Query(msgspec.Struct, forbid_unknown_fields=True):
    """What the query of a URL says of a body that is the input itself."""

    model: str = ""
    #: The input's name; may be left out where only one can hold it.
    input: str | None = None
    #: Sizes with commas between.
    shape: str | None = None
    version: int | None = None
    #: Names with commas between.
    outputs: str | None = None
    priority: int = 0
    timeout_ms: float | None = None
    codec: str | None = None


_T = TypeVar("_T")

#: Content types of a body that is the input itself.
_BINARY = re.compile(
    r"\s*(?:application/octet-stream|(?:image|audio)/[^;\s]+)\s*(?:;|$)", re.IGNORECASE
)
_SHAPE = re.compile(rf"\d{{1,9}}(?:,\d{{1,9}}){{0,{MAX_DIMENSIONS - 1}}}", re.ASCII)


def is_binary(content_type: str | None) -> bool:
    """Return whether a body of this content type is the input itself, for `parse_binary`."""
    return content_type is not None and _BINARY.match(content_type) is not None


def parse_submit(body: bytes) -> InferRequest:
    """Read the body of a submit.

    Raises:
      InvalidRequest: it is no JSON object of the documented form; names the field.
    """
    return _unify(decode(body, _Body))


def convert_submit(message: Mapping[str, Any]) -> InferRequest:
    """Read a submit that came as part of a larger message.

    Raises:
      InvalidRequest: as `parse_submit`.
    """
    try:
        return _unify(msgspec.convert(message, _Body))
    except msgspec.ValidationError as exc:
        raise _explain(exc) from None


def parse_predict(body: bytes, model: str) -> InferRequest:
    """Read the body of a predict for the model that the path names.

    Raises:
      InvalidRequest: it is no JSON object of the documented form; names the field.
    """
    given = decode(body, _PredictBody)
    by_instance = given.instances is not msgspec.UNSET
    if by_instance == (given.inputs is not msgspec.UNSET):
        raise InvalidField("expected either inputs, by name, or instances, by row", "inputs")
    return _checked(
        InferRequest(
            _columns(given.instances) if by_instance else given.inputs,
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
    )


def _columns(instances: Any) -> Any:
    """Return what is given by rows by inputs: by their names, or as one plain value."""
    if not instances:
        raise InvalidField("expected at least one instance", "instances")
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
    """Return base64 that is marked as such, `{"b64": "..."}`, as the text that it is."""
    if isinstance(value, dict) and value.keys() == {"b64"}:
        return value["b64"]
    return value


def parse_binary(body: bytes, query: Mapping[str, str], model: str | None = None) -> InferRequest:
    """Read a request whose body is the input itself.

    Args:
      body: an element of a `bytes` tensor, or a numeric tensor's little-endian, row-major bytes.
      query: the parameters of the URL.
      model: that the path names; None where the query does.
    Raises:
      InvalidRequest: a parameter is wrong; names it.
    """
    try:
        given = msgspec.convert(query, _Query, strict=False)
    except msgspec.ValidationError as exc:
        raise _explain(exc) from None
    if model is not None and given.model:
        raise InvalidField("the path names the model already", "model")
    if model is None and not given.model:
        raise InvalidField("missing parameter 'model'", "model")
    if given.shape is not None and not _SHAPE.fullmatch(given.shape):
        raise InvalidField(f"expected sizes such as 1,3,224,224, got {given.shape!r:.80}", "shape")
    shape = None if given.shape is None else tuple(map(int, given.shape.split(",")))
    value = Binary(body, shape)
    return _checked(
        InferRequest(
            value if given.input is None else {given.input: value},
            model or given.model,
            given.version,
            None if given.outputs is None else given.outputs.split(","),
            given.priority,
            given.timeout_ms,
            given.codec,
        )
    )


def decode(body: bytes, kind: type[_T]) -> _T:
    """Read a body that is a JSON object of a certain form.

    Raises:
      InvalidRequest: it is not; names the field.
    """
    if not body:
        raise InvalidRequest("expected a JSON object, got an empty body")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise _explain(exc) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"the body is no valid JSON: {exc}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def _explain(exc: msgspec.ValidationError) -> InvalidRequest:
    # Of a mapping, it says whether a key or a value is meant.
    text, _, path = str(exc).replace("`key` in ", "").partition(" - at `$")
    path, member = path.rstrip("`").lstrip("."), ""
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text):
        member, text = unknown[1], f"unknown field {unknown[1]!r}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text):
        member, text = missing[1], f"missing field {missing[1]!r}"
    field = ".".join(filter(None, (path, member))) or None
    return InvalidRequest(text) if field is None else InvalidField(text, field)


def _unify(body: _Body) -> InferRequest:
    return _checked(
        InferRequest(
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
    )


def _events(body: _Body | _PredictBody) -> list[str] | None:
    """Check a body's webhook and return the events that it is told of."""
    events, field = body.webhook_events, "webhook_events"
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
    if events is None:
        return list(DEFAULT_EVENTS)
    if not events:
        raise InvalidField(f"expected at least one of {', '.join(EVENTS)}", field)
    for event in events:
        if event not in EVENTS:
            raise InvalidField(f"expected {' or '.join(EVENTS)}, got {event!r}", field)
    return list(dict.fromkeys(events))


def _one_of(body: _Body, *names: str) -> Any:
    given = [name for name in names if getattr(body, name) is not msgspec.UNSET]
    if not given:
        raise InvalidField(f"missing field {names[0]!r}", names[0])
    if len(given) > 1:
        raise InvalidField(f"{given[0]} and {given[1]} mean the same; give one of them", given[1])
    return getattr(body, given[0])


def _checked(request: InferRequest) -> InferRequest:
    if not MIN_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidField(
            f"expected a priority from {MIN_PRIORITY} to {MAX_PRIORITY}, got {request.priority}",
            "priority",
        )
    if request.timeout_ms is not None and not 0 < request.timeout_ms <= 86_400_000:
        raise InvalidField(
            f"expected milliseconds, over 0 and at most one day, got {request.timeout_ms:g}",
            "timeout_ms",
        )
    if request.codec not in (None, "json", "base64"):
        raise InvalidField(f"expected json or base64, got {request.codec!r}", "codec")
    if request.input_type not in (None, "text", "image", "audio"):
        raise InvalidField(
            f"expected text, image or audio, got {request.input_type!r}", "input_type"
        )
    return request
