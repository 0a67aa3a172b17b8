"""The server and its models in the Open Inference Protocol: health, metadata, statistics."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, TypedDict

from flask import Blueprint, Response

from inferno.errors import BrokerUnavailable, ModelNotFound, ModelUnavailable, NotSupported
from inferno.protocol import oip
from inferno.repository.package import Package
from inferno.repository.repository import Model
from inferno.version import inferno_version
from web.calls import documents
from web.oip import describe as describing
from web.oip.describe import ERRORS, ModelMetadata, ModelStatistics
from web.openapi.describe import describe
from web.services import Services, services

blueprint = Blueprint("oip-models", __name__, url_prefix="/v2")


class Server(TypedDict):
    """The server."""

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


class Statistics(TypedDict):
    """Statistics of some versions."""

    model_stats: list[ModelStatistics]


@blueprint.get("")
@describe({200: Server}, problems=ERRORS)
def server() -> Response:
    """Name the server, its version and its extensions."""
    return documents.respond(
        {"name": "inferno", "version": inferno_version(), "extensions": oip.EXTENSIONS}
    )


@blueprint.get("/health/live")
@describe({200: ServerLive}, problems=ERRORS)
def live() -> Response:
    """Answer, which shows that this process is alive."""
    return documents.respond({"live": True})


@blueprint.get("/health/ready")
@describe({200: ServerReady}, errors=(ModelUnavailable, BrokerUnavailable), problems=ERRORS)
def ready() -> Response:
    """Tell whether every model is served."""
    if missing := services().missing_models():
        raise ModelUnavailable(f"no live worker serves {', '.join(missing)}")
    return documents.respond({"ready": True})


@blueprint.get("/models/<name>")
@blueprint.get("/models/<name>/versions/<version>")
@describe({200: ModelMetadata}, errors=(ModelNotFound,), problems=ERRORS)
def metadata(name: str, version: str | None = None) -> Response:
    """Describe the inputs and outputs of a model."""
    model, package = find(services(), name, version)
    versions = model.versions if version is None else [package.version]
    return documents.respond(describing.metadata(package, versions))


@blueprint.get("/models/<name>/ready")
@blueprint.get("/models/<name>/versions/<version>/ready")
@describe(
    {200: ModelReady},
    errors=(ModelNotFound, ModelUnavailable, BrokerUnavailable),
    problems=ERRORS,
)
def model_ready(name: str, version: str | None = None) -> Response:
    """Tell whether a model, or one of its versions, can be used."""
    here = services()
    model, package = find(here, name, version)
    workers = here.loaded()
    loaded = workers.get(name)
    number = package.version if version is not None else model.active
    # A worker without loaded versions loads them on first use.
    if loaded is None or number is None or (loaded and number not in loaded):
        raise ModelUnavailable(f"version {package.version} of {name} is not loaded")
    if missing := here.repository.missing(package, workers.__contains__):
        raise ModelUnavailable(f"no live worker serves {', '.join(missing)}, a stage of {name}")
    return documents.respond({"name": name, "ready": True})


@blueprint.get("/models/<name>/config")
@blueprint.get("/models/<name>/versions/<version>/config")
@describe({200: dict[str, Any]}, errors=(ModelNotFound,), problems=ERRORS)
def config(name: str, version: str | None = None) -> Response:
    """Show the configuration of a model, in Triton's terms."""
    here = services()
    _, package = find(here, name, version)
    batching = here.settings.batching
    return documents.respond(
        describing.config(
            package,
            package.max_batch_size(batching.max_batch_size),
            package.max_batch_delay_ms(batching.max_batch_delay_ms),
        )
    )


@blueprint.get("/models/stats")
@describe({200: Statistics}, errors=(BrokerUnavailable,), problems=ERRORS)
def all_statistics() -> Response:
    """Show the statistics of every version of every model."""
    models = services().repository.models.values()
    return _statistics((model.name, version) for model in models for version in model.versions)


@blueprint.get("/models/<name>/stats")
@blueprint.get("/models/<name>/versions/<version>/stats")
@describe({200: Statistics}, errors=(ModelNotFound, BrokerUnavailable), problems=ERRORS)
def statistics(name: str, version: str | None = None) -> Response:
    """Show the statistics of every version of a model, or of one version."""
    model, package = find(services(), name, version)
    versions = model.versions if version is None else [package.version]
    return _statistics((name, number) for number in versions)


def _statistics(versions: Iterable[tuple[str, int]]) -> Response:
    ordered = sorted(versions)
    found = services().statistics.read_all(ordered)
    shown = [describing.statistics(*one, read) for one, read in zip(ordered, found, strict=True)]
    return documents.respond({"model_stats": shown})


@blueprint.route("/systemsharedmemory", defaults={"rest": ""}, methods=["GET", "POST"])
@blueprint.route("/systemsharedmemory/<path:rest>", methods=["GET", "POST"])
@blueprint.route("/cudasharedmemory", defaults={"rest": ""}, methods=["GET", "POST"])
@blueprint.route("/cudasharedmemory/<path:rest>", methods=["GET", "POST"])
def shared_memory(rest: str) -> Response:
    """Refuse: a task outlives the memory of its client."""
    raise NotSupported("shared memory is not supported; send tensors in the request")


def find(here: Services, name: str, version: str | None) -> tuple[Model, Package]:
    """Return a model, and the version that a path names.

    Raises:
      ModelNotFound: no such model or version.
    """
    model = here.repository.model(name)
    number = version_number(version)
    return model, model.described if number is None else model.package(number)


def version_number(version: str | None) -> int | None:
    """Return the version of a path as a number; None if the path has no version.

    Raises:
      ModelNotFound: the version is not a number.
    """
    if version is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise ModelNotFound(f"no version {version!r:.40}; versions are numbers", "version")
    return int(version)
