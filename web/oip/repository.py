"""The model repository extension of the Open Inference Protocol: list, load and unload models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypedDict

import msgspec
from flask import Blueprint, Response, request

from inferno.errors import (
    BrokerUnavailable,
    FateUnknown,
    InvalidField,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    ModelUnavailable,
    NotInTime,
    NotSupported,
    PayloadTooLarge,
    WrongState,
    for_callers,
)
from inferno.protocol import oip
from inferno.protocol.decoding import decode
from web.calls import documents
from web.oip.describe import ERRORS
from web.openapi.describe import describe
from web.services import Services, services

blueprint = Blueprint("oip-repository", __name__, url_prefix="/v2")


class IndexEntry(TypedDict):
    """A version of a model."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class Nothing(TypedDict):
    """An empty object."""


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


@blueprint.post("/repository/index")
@describe(
    {200: list[IndexEntry]},
    errors=(InvalidRequest, InvalidField, BrokerUnavailable),
    body=oip.IndexRequest,
    problems=ERRORS,
)
def index() -> Response:
    """List every version of every model, and whether it is loaded."""
    body = request.get_data()
    here = services()
    limits = here.gateway.limits
    only_ready = decode(body, oip.IndexRequest, limits).ready if body.strip() else False
    entries = _ready(here) if only_ready else _all(here)
    return Response(documents.encode(list(entries)), mimetype="application/json")


def _ready(here: Services) -> Iterator[IndexEntry]:
    loaded = here.loaded()
    for model in here.catalog.refresh().models.values():
        for version in sorted(model.versions):
            if version in loaded.get(model.name, ()):
                yield _entry(model.name, version, "READY")


def _all(here: Services) -> Iterator[IndexEntry]:
    repository = here.catalog.refresh()
    loaded, failed = here.loaded(), here.failed()
    for model in repository.models.values():
        for version in sorted(model.versions):
            if version in loaded.get(model.name, ()):
                yield _entry(model.name, version, "READY")
            else:
                reason = failed.get(model.name, {}).get(version, "not loaded")
                yield _entry(model.name, version, "UNAVAILABLE", reason)
        for broken, why in model.errors.items():
            yield _entry(model.name, broken, "UNAVAILABLE", for_callers(why))
    for name, why in repository.errors.items():
        yield _entry(name, "", "UNAVAILABLE", for_callers(why))


def _entry(
    name: str, version: int | str, state: Literal["READY", "UNAVAILABLE"], reason: str = ""
) -> IndexEntry:
    return {"name": name, "version": str(version), "state": state, "reason": reason}


@blueprint.post("/repository/models/<name>/load")
@describe({200: Nothing}, errors=_ROLLOUT_ERRORS, body=oip.LoadRequest, problems=ERRORS)
def load(name: str) -> Response:
    """Load the newest version of a model, or the one that its `config` names, in every worker."""
    here = services()
    version = _requested_version(_parameters(), name)
    here.rollouts.load(here.catalog.refresh().model(name), version)
    here.catalog.refresh(packages=False)
    return documents.respond({})


@blueprint.post("/repository/models/<name>/unload")
@describe({200: Nothing}, errors=_ROLLOUT_ERRORS, body=oip.LoadRequest, problems=ERRORS)
def unload(name: str) -> Response:
    """Take all versions of a model out of service, and drop them in every worker."""
    here = services()
    _parameters()
    here.rollouts.unload(here.catalog.refresh().model(name))
    here.catalog.refresh(packages=False)
    return documents.respond({})


def _parameters() -> dict[str, Any]:
    body = request.get_data()
    limits = services().gateway.limits
    return decode(body, oip.LoadRequest, limits).parameters if body.strip() else {}


def _requested_version(parameters: dict[str, Any], name: str) -> int | None:
    """Return the version that a load asks for; None for the newest.

    Raises:
      NotSupported: the request asks for something else.
    """
    if any(parameter.startswith("file:") for parameter in parameters):
        raise NotSupported("files cannot be sent with a load; put the package into the repository")
    if (given := parameters.get("config")) is None:
        return None
    try:
        policy = decode(given, _Config, services().gateway.limits).version_policy
    except (InvalidRequest, TypeError, AttributeError) as exc:
        raise InvalidField(f"expected a configuration as JSON: {exc}", "config") from None
    if policy is None or policy.specific is None:
        return None
    if len(policy.specific.versions) != 1:
        raise NotSupported(
            f"only one version can be loaded at a time; for shares, use /v1/models/{name}/active"
        )
    return policy.specific.versions[0]


class _Specific(msgspec.Struct):
    versions: list[int]


class _Policy(msgspec.Struct):
    specific: _Specific | None = None


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    version_policy: _Policy | None = None
