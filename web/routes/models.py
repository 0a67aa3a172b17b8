"""Models: what can be served, what is ready, and rollouts."""

from __future__ import annotations

from collections.abc import Set
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
from flask import Blueprint, Response, request
from msgspec import Meta

from inferno.errors import (
    BrokerUnavailable,
    FateUnknown,
    InvalidField,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    ModelUnavailable,
    NotInTime,
    WrongState,
    for_callers,
)
from inferno.protocol.deployments import (
    Activate,
    Load,
    Unload,
    parse_activate,
    parse_load,
    parse_unload,
)
from inferno.repository.manifest import MANIFEST
from inferno.repository.package import Package
from inferno.repository.repository import Model
from inferno.settings import BatchingSettings
from tasks.state.cluster import WorkerReport
from web.calls import documents
from web.calls.parameters import read
from web.openapi.describe import ModelSchemas, describe
from web.routes.schemas import predict_schemas
from web.services import Services, services

blueprint = Blueprint("models", __name__)


class ModelSummary(TypedDict):
    """A model in a list."""

    id: Annotated[str, Meta(examples=["sentiment"])]
    object: Literal["model"]
    created: Annotated[int, Meta(description="Seconds since 1970.")]
    owned_by: str
    name: Annotated[str, Meta(examples=["sentiment"])]
    description: str
    task: Annotated[str, Meta(examples=["classification"])]
    version: Annotated[int | None, Meta(description="Version that answers requests without one.")]
    active: Annotated[int | None, Meta(description="The same as `version`.")]
    versions: Annotated[list[int], Meta(description="Versions in the repository.")]
    loaded_versions: Annotated[
        list[int], Meta(description="Versions that a ready worker has loaded.")
    ]
    failed_versions: Annotated[
        dict[str, str], Meta(description="Versions that a worker could not load, and why.")
    ]
    ready: Annotated[bool, Meta(description="Whether ready workers serve it, stages included.")]


class ModelList(TypedDict):
    """All models, twice, under the names that different clients expect."""

    object: Literal["list"]
    data: list[ModelSummary]
    models: list[ModelSummary]
    broken: Annotated[dict[str, str], Meta(description="Models that cannot be served, and why.")]


class HeldView(TypedDict):
    """One version in one worker."""

    worker: str
    device: str
    version: int
    state: Annotated[str, Meta(description="`loading`, `ready` or `failed`.")]
    digest: NotRequired[Annotated[str, Meta(description="Digest of the loaded package.")]]
    asked: NotRequired[int]
    error: NotRequired[Annotated[str, Meta(description="Why the version could not be loaded.")]]
    load_s: NotRequired[Annotated[float, Meta(description="How long it took to load, in seconds.")]]
    memory_bytes: NotRequired[
        Annotated[int, Meta(description="Memory of the version, as far as it can be measured.")]
    ]


class BatchingView(TypedDict):
    """How tasks share forward passes."""

    max_batch_size: int
    max_batch_delay_ms: float
    oversized: str


class ModelView(ModelSummary):
    """A model with its signature and its workers."""

    format: Annotated[str, Meta(description="Runtime of the model.", examples=["onnx"])]
    signature: Annotated[
        dict[str, Any], Meta(description="Declared `inputs` and `outputs`, and `one_of`.")
    ]
    labels: list[str]
    batching: BatchingView
    codec: str
    example: Annotated[dict[str, Any], Meta(description="A body to submit.")]
    broken_versions: dict[str, str]
    workers: list[HeldView]


class ActiveView(TypedDict):
    """The versions that answer requests without one."""

    name: str
    version: Annotated[int | None, Meta(description="Version with the largest share.")]
    loaded: Annotated[bool, Meta(description="Whether ready workers have loaded all of them.")]
    shares: Annotated[dict[str, float], Meta(description="Share of the requests, by version.")]
    follows_latest: bool


class LoadedView(TypedDict):
    """A version that was loaded."""

    loaded: Literal[True]
    name: str
    version: int
    active: int | None
    workers: list[HeldView]


class UnloadedView(TypedDict):
    """What was taken out of service."""

    unloaded: Literal[True]
    name: str
    version: Annotated[int | None, Meta(description="Null for all versions.")]
    active: int | None


class SchemaQuery(msgspec.Struct):
    """Which version is described."""

    version: Annotated[int | None, Meta(description="Version; the active one by default.")] = None


_CHANGES = (
    InvalidRequest,
    InvalidField,
    ModelNotFound,
    WrongState,
    LoadFailed,
    NotInTime,
    ModelUnavailable,
    BrokerUnavailable,
    FateUnknown,
)


@blueprint.get("/models")
@describe({200: ModelList}, errors=(BrokerUnavailable,), prefix="/v1")
def index() -> Response:
    """List the models, under the names that OpenAI's clients and others expect."""
    here = services()
    repository, loaded, failed = here.catalog.refresh(), here.loaded(), here.failed()
    served = repository.ready(loaded.__contains__)
    models = [summary(model, loaded, failed, served) for model in repository.models.values()]
    document = {
        "object": "list",
        "data": models,
        "models": models,
        "broken": {name: for_callers(why) for name, why in repository.errors.items()},
    }
    return documents.respond(document)


@blueprint.get("/models/<name>")
@describe({200: ModelView}, errors=(ModelNotFound, BrokerUnavailable), prefix="/v1")
def show(name: str) -> Response:
    """Describe a model with its signature; a model that loads on first use begins to load."""
    here = services()
    repository, loaded = here.catalog.refresh(), here.loaded()
    model = repository.model(name)
    served = repository.ready(loaded.__contains__)
    if model.active is not None and not loaded.get(name, {model.active}):
        here.deployments.nudge(name, model.active)
    return documents.respond(
        detail(model, loaded, here.failed(), served, here.settings.batching)
        | {"workers": _workers(here.cluster.serving(name), name)}
    )


@blueprint.get("/models/<name>/schema")
@describe(
    {200: ModelSchemas},
    errors=(InvalidRequest, ModelNotFound, BrokerUnavailable),
    query=(SchemaQuery,),
    prefix="/v1",
)
def schema(name: str) -> Response:
    """Return the JSON Schemas of the body and the answer of a model's predict."""
    package = services().catalog.refresh().model(name).package(read(SchemaQuery).version)
    return documents.respond(predict_schemas(package))


@blueprint.get("/models/<name>/active")
@describe({200: ActiveView}, errors=(ModelNotFound, BrokerUnavailable), prefix="/v1")
def active(name: str) -> Response:
    """Show which versions answer requests without one, and whether they are loaded."""
    here = services()
    return documents.respond(_active(here, here.catalog.refresh().model(name)))


@blueprint.route("/models/<name>/active", methods=["POST", "PUT"])
@describe({200: ActiveView}, errors=_CHANGES, body=Activate, prefix="/v1")
def activate(name: str) -> Response:
    """Load versions in every worker, then send them the requests without a version."""
    here = services()
    model = here.catalog.refresh().model(name)
    body = parse_activate(request.get_data(), services().gateway.limits)
    if isinstance(body.version, str):
        here.rollouts.load(model, None)
    else:
        here.rollouts.activate(model, body.shares)
    return documents.respond(_active(here, here.catalog.refresh().model(name)))


@blueprint.post("/models:load")
@describe({200: LoadedView}, errors=_CHANGES, body=Load, prefix="/v1")
def load() -> Response:
    """Load a version in every worker, then send it traffic unless the body says otherwise."""
    here = services()
    body = parse_load(request.get_data(), services().gateway.limits)
    model = here.catalog.refresh().model(body.name)
    version = None if isinstance(body.version, str) else body.version
    version = here.rollouts.load(model, version, activate=body.activate)
    model = here.catalog.refresh().model(body.name)
    document = {"loaded": True, "name": body.name, "version": version, "active": model.active}
    workers = _workers(here.cluster.serving(body.name, 0.0), body.name, version)
    return documents.respond(document | {"workers": workers})


@blueprint.post("/models:unload")
@describe({200: UnloadedView}, errors=_CHANGES, body=Unload, prefix="/v1")
def unload() -> Response:
    """Take one or all versions of a model out of service, and drop them in every worker."""
    here = services()
    body = parse_unload(request.get_data(), services().gateway.limits)
    here.rollouts.unload(here.catalog.refresh().model(body.name), body.version)
    model = here.catalog.refresh().model(body.name)
    return documents.respond(
        {"unloaded": True, "name": body.name, "version": body.version, "active": model.active}
    )


def _active(here: Services, model: Model) -> dict[str, Any]:
    versions = here.loaded(0.0).get(model.name, set())
    shares = model.shares or ({} if model.active is None else {model.active: 1.0})
    total = sum(shares.values())
    return {
        "name": model.name,
        "version": model.active,
        "loaded": bool(shares) and shares.keys() <= versions,
        "shares": {str(version): share / total for version, share in sorted(shares.items())},
        "follows_latest": model.follows_latest,
    }


def _workers(
    reports: list[WorkerReport], name: str, version: int | None = None
) -> list[dict[str, Any]]:
    """Return the versions of a model in each worker, or only one version."""
    return [
        {"worker": report.label, "device": report.device, "version": held_version}
        | msgspec.to_builtins(held)
        | ({} if held.error is None else {"error": for_callers(held.error)})
        for report in reports
        for held_version, held in sorted(report.held.get(name, {}).items())
        if version in (None, held_version)
    ]


def summary(
    model: Model,
    loaded: dict[str, set[int]],
    failed: dict[str, dict[int, str]],
    served: Set[str],
) -> dict[str, Any]:
    """Return a model as a list shows it.

    Args:
      model: the model.
      loaded: versions that ready workers have loaded, by model.
      failed: why a worker could not load a version, by model and version.
      served: models that can answer.
    """
    package = model.described
    return {
        "id": model.name,
        "object": "model",
        "created": int((package.path / MANIFEST).stat().st_mtime),
        "owned_by": "inferno",
        "name": model.name,
        "description": package.manifest.description,
        "task": package.manifest.task,
        "version": model.active,
        "active": model.active,
        "versions": sorted(model.versions),
        "loaded_versions": sorted(loaded.get(model.name, ())),
        "failed_versions": {str(v): why for v, why in failed.get(model.name, {}).items()},
        "ready": model.name in served and model.active is not None,
    }


def detail(
    model: Model,
    loaded: dict[str, set[int]],
    failed: dict[str, dict[int, str]],
    served: Set[str],
    defaults: BatchingSettings,
) -> dict[str, Any]:
    """Return a model with its signature; arguments as `summary`."""
    manifest = model.described.manifest
    return summary(model, loaded, failed, served) | {
        "format": manifest.format,
        "signature": manifest.signature.model_dump(mode="json", exclude_none=True),
        "labels": list(manifest.labels),
        "batching": batching(model.described, defaults),
        "codec": manifest.codecs.default,
        "example": {"model": model.name, "inputs": manifest.warm_up.inputs},
        "broken_versions": {v: for_callers(why) for v, why in model.errors.items()},
    }


def batching(package: Package, defaults: BatchingSettings) -> dict[str, Any]:
    """Return how tasks of a model share forward passes, with the defaults filled in."""
    own = package.manifest.batching
    delay = own.max_batch_delay_ms
    return {
        "max_batch_size": package.max_batch_size(defaults.max_batch_size),
        "max_batch_delay_ms": defaults.max_batch_delay_ms if delay is None else delay,
        "oversized": own.oversized,
    }
