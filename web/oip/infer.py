"""The Open Inference Protocol, version 2, with Triton's extensions, under `/v2`."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
from flask import Blueprint, Response, after_this_request, request
from msgspec import Meta

from inferno.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    FateUnknown,
    ForwardFailed,
    InputsLost,
    InvalidField,
    InvalidInput,
    InvalidRequest,
    KeyReused,
    LoadFailed,
    ModelNotFound,
    ModelUnavailable,
    NotInTime,
    NotSupported,
    Overloaded,
    PayloadTooLarge,
    ResultExpired,
    TaskCancelled,
    WorkerLost,
    WrongState,
)
from inferno.protocol import oip
from inferno.protocol.requests import InferRequest, decode
from inferno.repository.repository import Model, Package
from inferno.version import inferno_version
from tasks.intake.submit import Accepted
from web.calls import disconnect, documents, idempotency
from web.calls.errors import OipError, oip_error
from web.calls.preference import PREFERENCE_APPLIED, prefer
from web.oip import describe as oip_models
from web.openapi.document import RETRY_AFTER, Answer, ErrorForm, Header, describe
from web.routes import infer
from web.routes.health import missing_models
from web.services import Services, services

blueprint = Blueprint("oip", __name__, url_prefix="/v2")
blueprint.register_error_handler(disconnect.Disconnected, infer.hung_up)

#: Answers that are shorter are not compressed, in bytes.
COMPRESSED_BYTES = 1024
#: Of zlib: the formats that HTTP calls gzip and deflate.
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Server(TypedDict):
    """What this server is."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(TypedDict):
    """The process answers."""

    live: Literal[True]


class ServerReady(TypedDict):
    """Every model is served."""

    ready: Literal[True]


class ModelReady(TypedDict):
    """A model can be used."""

    name: str
    ready: Literal[True]


class OutputOfRequest(TypedDict):
    """One output."""

    name: str
    datatype: Annotated[str, Meta(examples=["FP32"])]
    shape: list[int]
    data: NotRequired[Annotated[list[Any], Meta(description="Flat; not there where it is binary.")]]
    parameters: NotRequired[dict[str, Any]]


class InferenceAnswer(TypedDict):
    """The outputs of an inference."""

    model_name: str
    model_version: str
    id: NotRequired[Annotated[str, Meta(description="As the client gave it.")]]
    outputs: list[OutputOfRequest]
    parameters: NotRequired[dict[str, Any]]


class Generated(TypedDict):
    """The text that a model made."""

    model_name: str
    model_version: str
    text_output: str
    id: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


class IndexEntry(TypedDict):
    """A version of a model."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class Statistics(TypedDict):
    """What the tasks of some versions have come to."""

    model_stats: list[oip_models.ModelStatistics]


class Nothing(TypedDict):
    """An empty object."""


#: The protocol does not tell an invalid field from an invalid body.
ERRORS = ErrorForm(OipError, "application/json", 400, lambda error: oip_error(error.problem()))

_LENGTH = Header(
    oip.HEADER_LENGTH, "How many bytes of the body are its JSON; binary tensors follow."
)
_ENCODING = Header("Content-Encoding", "`gzip` or `deflate`.")
_CALL_HEADERS = (*infer.HEADERS, _LENGTH, _ENCODING)
_CALL_ALWAYS = (idempotency.REPLAYED, PREFERENCE_APPLIED)
_CALL_ERRORS = (
    InvalidRequest,
    InvalidField,
    InvalidInput,
    KeyReused,
    ModelNotFound,
    TaskCancelled,
    ResultExpired,
    Overloaded,
    ForwardFailed,
    WorkerLost,
    InputsLost,
    ModelUnavailable,
    BrokerUnavailable,
    FateUnknown,
    DeadlineExceeded,
    NotInTime,
)
_MODEL_ERRORS = (ModelNotFound, ModelUnavailable, BrokerUnavailable)
_ROLLOUT_ERRORS = (
    InvalidRequest,
    InvalidField,
    ModelNotFound,
    WrongState,
    LoadFailed,
    NotSupported,
    ModelUnavailable,
    BrokerUnavailable,
    FateUnknown,
    NotInTime,
    PayloadTooLarge,
)
_ACCEPTED = Answer(documents.AcceptedTask, "The task was accepted.", (infer.LOCATION, RETRY_AFTER))


# -- The server ------------------------------------------------------------------------------------


@blueprint.get("")
@describe({200: Server}, problems=ERRORS)
def server() -> Response:
    """Say what this server is."""
    return documents.respond(
        {"name": "inferno", "version": inferno_version(), "extensions": oip.EXTENSIONS}
    )


@blueprint.get("/health/live")
@describe({200: ServerLive}, problems=ERRORS)
def live() -> Response:
    """Say that this process answers."""
    return documents.respond({"live": True})


@blueprint.get("/health/ready")
@describe({200: ServerReady}, errors=(ModelUnavailable, BrokerUnavailable), problems=ERRORS)
def ready() -> Response:
    """Say whether every model is served."""
    if missing := missing_models(services()):
        raise ModelUnavailable(f"no live worker serves {', '.join(missing)}")
    return documents.respond({"ready": True})


# -- Models ----------------------------------------------------------------------------------------


@blueprint.get("/models/<name>")
@blueprint.get("/models/<name>/versions/<version>")
@describe({200: oip_models.ModelMetadata}, errors=(ModelNotFound,), problems=ERRORS)
def metadata(name: str, version: str | None = None) -> Response:
    """Describe the inputs and outputs of a model."""
    model, package = _find(services(), name, version)
    versions = model.versions if version is None else [package.version]
    return documents.respond(oip_models.metadata(package, versions))


@blueprint.get("/models/<name>/ready")
@blueprint.get("/models/<name>/versions/<version>/ready")
@describe({200: ModelReady}, errors=_MODEL_ERRORS, problems=ERRORS)
def model_ready(name: str, version: str | None = None) -> Response:
    """Say whether a model, or one of its versions, can be used."""
    here = services()
    model, package = _find(here, name, version)
    workers = here.loaded()
    loaded = workers.get(name)
    wanted = package.version if version is not None else model.active
    # A version that is loaded on first use can be used, too.
    if loaded is None or wanted is None or (loaded and wanted not in loaded):
        raise ModelUnavailable(f"version {package.version} of {name} is not loaded")
    if missing := here.repository.missing(package, workers.__contains__):
        raise ModelUnavailable(f"nothing answers for {', '.join(missing)}, of which it is made")
    return documents.respond({"name": name, "ready": True})


@blueprint.get("/models/<name>/config")
@blueprint.get("/models/<name>/versions/<version>/config")
@describe({200: dict[str, Any]}, errors=(ModelNotFound,), problems=ERRORS)
def config(name: str, version: str | None = None) -> Response:
    """Tell the configuration of a model, in Triton's words."""
    here = services()
    _, package = _find(here, name, version)
    batching = here.settings.batching
    return documents.respond(
        oip_models.config(
            package,
            package.max_batch_size(batching.max_batch_size),
            package.max_batch_delay_ms(batching.max_batch_delay_ms),
        )
    )


@blueprint.get("/models/stats")
@describe({200: Statistics}, errors=(BrokerUnavailable,), problems=ERRORS)
def all_statistics() -> Response:
    """Tell what the tasks of every version have come to."""
    models = services().repository.models.values()
    return _statistics((model.name, version) for model in models for version in model.versions)


@blueprint.get("/models/<name>/stats")
@blueprint.get("/models/<name>/versions/<version>/stats")
@describe({200: Statistics}, errors=(ModelNotFound, BrokerUnavailable), problems=ERRORS)
def statistics(name: str, version: str | None = None) -> Response:
    """Tell what the tasks of a model have come to, by versions, or those of one version."""
    model, package = _find(services(), name, version)
    versions = model.versions if version is None else [package.version]
    return _statistics((name, number) for number in versions)


def _statistics(versions: Iterable[tuple[str, int]]) -> Response:
    wanted = sorted(versions)
    found = services().statistics.read_all(wanted)
    told = [oip_models.statistics(*one, read) for one, read in zip(wanted, found, strict=True)]
    return documents.respond({"model_stats": told})


# -- Inference -------------------------------------------------------------------------------------


@blueprint.post("/models/<name>/infer")
@blueprint.post("/models/<name>/versions/<version>/infer")
@describe(
    {
        200: Answer(
            InferenceAnswer, "The outputs.", (_LENGTH,), binary=("application/octet-stream",)
        ),
        202: _ACCEPTED,
    },
    errors=_CALL_ERRORS,
    body=oip.InferenceRequest,
    binary=("application/octet-stream",),
    headers=_CALL_HEADERS,
    always=_CALL_ALWAYS,
    problems=ERRORS,
)
def run_infer(name: str, version: str | None = None) -> Response:
    """Run a model; the call is a durable task like any other."""
    here = services()
    body = _body(here.settings.limits.max_body_bytes)
    wanted, form = oip.parse_infer(
        body, request.headers.get(oip.HEADER_LENGTH), name, _number(version)
    )
    task, result = _run(here, wanted, body)
    if result is None:
        return _accepted(task)
    package = here.repository.model(name).versions.get(task.version or 0)
    labels = () if package is None else package.manifest.labels
    answer, header_length = oip.write_infer(result, task.task_id, form, labels)
    return _answer(answer, header_length)


@blueprint.post("/models/<name>/generate")
@blueprint.post("/models/<name>/versions/<version>/generate")
@describe(
    {200: Generated, 202: _ACCEPTED},
    errors=_CALL_ERRORS,
    body=oip.GenerateRequest,
    headers=_CALL_HEADERS,
    always=_CALL_ALWAYS,
    problems=ERRORS,
)
def generate(name: str, version: str | None = None) -> Response:
    """Make a text of a text, with a model that does that."""
    document = _generate(name, version)
    if isinstance(document, Accepted):
        return _accepted(document)
    return _answer(documents.encode(document), None)


@blueprint.post("/models/<name>/generate_stream")
@blueprint.post("/models/<name>/versions/<version>/generate_stream")
@describe(
    {200: Answer(None, "One event.", media_type="text/event-stream"), 202: _ACCEPTED},
    errors=_CALL_ERRORS,
    body=oip.GenerateRequest,
    headers=_CALL_HEADERS,
    always=_CALL_ALWAYS,
    problems=ERRORS,
)
def generate_stream(name: str, version: str | None = None) -> Response:
    """Make a text of a text; it comes as one event, because models give whole texts."""
    document = _generate(name, version)
    if isinstance(document, Accepted):
        return _accepted(document)
    event = b"data: " + documents.encode(document).strip() + b"\n\n"
    return Response(event, content_type="text/event-stream; charset=utf-8")


def _generate(name: str, version: str | None) -> dict[str, Any] | Accepted:
    here = services()
    body = _body(here.settings.limits.max_body_bytes)
    given = decode(body, oip.GenerateRequest)
    _, package = _find(here, name, version)
    if (texts := oip.texts_of(package.signature)) is None:
        raise InvalidRequest(f"{name} does not take one text and give one; use /infer")
    if given.parameters:
        raise InvalidField(
            f"{name} takes no parameters, got {', '.join(given.parameters)}", "parameters"
        )
    wanted = InferRequest({texts[0]: given.text_input}, name, _number(version))
    task, result = _run(here, wanted, body)
    return task if result is None else oip.write_generate(result, task.task_id, given.id)


def _run(here: Services, wanted: InferRequest, body: bytes) -> tuple[Accepted, bytes | None]:
    """Run a model as `:predict` does. What was asked before, and still runs, is waited for.

    Returns:
      the task, and its result; None if its caller did not want to wait for that.
    Raises:
      NotInTime: it did not come in time; the task goes on.
      ResultExpired: it was asked before, and its result was deleted.
    """
    key = idempotency.from_header(f"{request.path} {request.headers.get(oip.HEADER_LENGTH)}", body)
    preference = prefer(request.headers.get("Prefer"), here.settings.server.sync_wait_ms / 1000)
    wanted = infer.as_headers_say(wanted, request.environ)
    sock = disconnect.socket_of(request.environ)
    task, outcome = infer.run(here, wanted, preference, key, sock)
    # Also where it failed.
    after_this_request(lambda response: infer.marked(response, preference, task.replayed))
    if preference.applied is not None and not preference.wait_s:
        return task, None
    if task.replayed:
        record, outcome = here.fetch(task.task_id, preference.wait_s)
        documents.task(task.task_id, record, outcome)  # Raises if its result is gone.
    if outcome is None:
        if preference.applied is not None:
            return task, None
        raise NotInTime(f"it did not end in time, and goes on as /tasks/{task.task_id}")
    if outcome.error is not None:
        raise outcome.error
    return task, bytes(outcome.result)


def _accepted(task: Accepted) -> Response:
    response = documents.respond(documents.accepted(task, ()), 202)
    response.headers["Location"] = f"/tasks/{task.task_id}"
    response.headers["Retry-After"] = str(infer.RETRY_AFTER_S)
    return response


def _body(limit: int) -> bytes:
    """Return the body of the request, decompressed.

    Raises:
      PayloadTooLarge: it is over the limit, in bytes.
      InvalidRequest: it is not compressed as it says.
    """
    # Clients say nothing of its type.
    body = request.get_data(cache=False)
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    window = _WINDOWS.get(encoding)
    if window is None:
        raise InvalidRequest(f"Content-Encoding: expected gzip or deflate, got {encoding!r:.40}")
    unpacker = zlib.decompressobj(window)
    try:
        unpacked = unpacker.decompress(body, limit + 1)
    except zlib.error as exc:
        raise InvalidRequest(f"the body is no valid {encoding}: {exc}") from None
    if len(unpacked) > limit:
        raise PayloadTooLarge(f"expected a body of at most {limit} bytes, decompressed")
    if not unpacker.eof:
        raise InvalidRequest(f"the body is no valid {encoding}: it ends too early")
    if unpacker.unused_data:
        raise InvalidRequest(f"the body is no valid {encoding}: more follows behind its end")
    return unpacked


def _answer(body: bytes, header_length: int | None) -> Response:
    response = Response(mimetype="application/json")
    if header_length is not None:
        response.mimetype = "application/octet-stream"
        response.headers[oip.HEADER_LENGTH] = str(header_length)
    if len(body) >= COMPRESSED_BYTES:
        accepted = request.accept_encodings
        encoding = max(_WINDOWS, key=lambda name: accepted[name])
        if accepted[encoding]:
            fast = 1
            body = (gzip if encoding == "gzip" else zlib).compress(body, fast)
            response.headers["Content-Encoding"] = encoding
        response.headers["Vary"] = "Accept-Encoding"
    response.set_data(body)
    return response


# -- The repository --------------------------------------------------------------------------------


@blueprint.post("/repository/index")
@describe(
    {200: list[IndexEntry]},
    errors=(InvalidRequest, InvalidField, BrokerUnavailable),
    body=oip.IndexRequest,
    problems=ERRORS,
)
def index() -> Response:
    """List every version of every model, and whether it is loaded."""
    here = services()
    body = request.get_data()
    only_ready = decode(body, oip.IndexRequest).ready if body.strip() else False
    repository = here.catalog.refresh()
    loaded, failed = here.loaded(), here.failed()
    found = []
    for model in repository.models.values():
        for version in sorted(model.versions):
            reason = failed.get(model.name, {}).get(version, "")
            if version in loaded.get(model.name, ()):
                found.append(_state(model.name, version, "READY", ""))
            elif not only_ready:
                found.append(_state(model.name, version, "UNAVAILABLE", reason or "not loaded"))
        if not only_ready:
            for name, why in model.errors.items():
                found.append(_state(model.name, name, "UNAVAILABLE", why))
    if not only_ready:
        for name, why in repository.errors.items():
            found.append(_state(name, "", "UNAVAILABLE", why))
    return Response(documents.encode(found), mimetype="application/json")


def _state(name: str, version: int | str, state: str, reason: str) -> dict[str, str]:
    return {"name": name, "version": str(version), "state": state, "reason": reason}


@blueprint.post("/repository/models/<name>/load")
@describe({200: Nothing}, errors=_ROLLOUT_ERRORS, body=oip.LoadRequest, problems=ERRORS)
def load(name: str) -> Response:
    """Load the newest version of a model, or the one that its `config` names, in all workers."""
    here = services()
    version = _wanted_version(_parameters(), name)
    here.rollouts.load(here.catalog.refresh().model(name), version)
    here.catalog.refresh(packages=False)
    return documents.respond({})


@blueprint.post("/repository/models/<name>/unload")
@describe({200: Nothing}, errors=_ROLLOUT_ERRORS, body=oip.LoadRequest, problems=ERRORS)
def unload(name: str) -> Response:
    """Take all versions of a model out of service, and out of the workers' memory."""
    here = services()
    _parameters()
    here.rollouts.unload(here.catalog.refresh().model(name))
    here.catalog.refresh(packages=False)
    return documents.respond({})


def _parameters() -> dict[str, Any]:
    body = request.get_data()
    return decode(body, oip.LoadRequest).parameters if body.strip() else {}


def _wanted_version(parameters: dict[str, Any], name: str) -> int | None:
    """Return the one version that a load asks for, None for the newest.

    Raises:
      NotSupported: it asks for something else.
    """
    if any(parameter.startswith("file:") for parameter in parameters):
        raise NotSupported("files cannot be sent with a load; put the package into the repository")
    if (given := parameters.get("config")) is None:
        return None
    try:
        policy = msgspec.json.decode(given, type=_Config).version_policy
    except (msgspec.DecodeError, TypeError) as exc:
        raise InvalidField(f"expected a configuration as JSON: {exc}", "config") from None
    if policy is None or policy.specific is None:
        return None
    if len(policy.specific.versions) != 1:
        raise NotSupported(
            f"one version at a time can be loaded; for shares, use /v1/models/{name}/active"
        )
    return policy.specific.versions[0]


class _Specific(msgspec.Struct):
    versions: list[int]


class _Policy(msgspec.Struct):
    specific: _Specific | None = None


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    version_policy: _Policy | None = None


# -- What there is not -----------------------------------------------------------------------------


@blueprint.route("/systemsharedmemory", defaults={"rest": ""}, methods=["GET", "POST"])
@blueprint.route("/systemsharedmemory/<path:rest>", methods=["GET", "POST"])
@blueprint.route("/cudasharedmemory", defaults={"rest": ""}, methods=["GET", "POST"])
@blueprint.route("/cudasharedmemory/<path:rest>", methods=["GET", "POST"])
def shared_memory(rest: str) -> Response:
    """Refuse: a task outlives the memory of its client."""
    raise NotSupported("shared memory is not supported; send tensors in the request")


def _find(here: Services, name: str, version: str | None) -> tuple[Model, Package]:
    """Return a model, and the version that a path names.

    Raises:
      ModelNotFound: there is no such model or version.
    """
    model = here.repository.model(name)
    number = _number(version)
    return model, model.described if number is None else model.package(number)


def _number(version: str | None) -> int | None:
    if version is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise ModelNotFound(f"no version {version!r:.40}; versions are numbers", "version")
    return int(version)
