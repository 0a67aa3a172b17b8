"""The kept results, for operators."""

from __future__ import annotations

from typing import Annotated, TypedDict

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from inferno.errors import BrokerUnavailable
from web.calls import documents
from web.calls.parameters import read
from web.openapi.document import describe
from web.services import services

blueprint = Blueprint("cache", __name__)

#: What is shown of each model; names of `VersionStatistics`.
COUNTED = ("hits", "misses", "coalesced", "deduplicated")


class ClearQuery(msgspec.Struct):
    """What is forgotten."""

    model: Annotated[str | None, Meta(description="Only results of this model.")] = None


class ModelCounts(TypedDict):
    """Tasks of a model, since Redis was empty."""

    model: Annotated[str, Meta(examples=["sentiment"])]
    hits: Annotated[int, Meta(description="Answered with a kept result.")]
    misses: Annotated[int, Meta(description="That were to be computed.")]
    coalesced: Annotated[int, Meta(description="Answered together with one under way.")]
    deduplicated: Annotated[int, Meta(description="Computed once for several in one batch.")]


class Kept(TypedDict):
    """How many results are kept, and what they have saved."""

    entries: int
    bytes: int
    max_entries: int
    max_bytes: int
    models: list[ModelCounts]


class Cleared(TypedDict):
    """What was forgotten."""

    cleared: Annotated[int, Meta(description="How many results.")]


@blueprint.get("/cache")
@describe({200: Kept}, errors=(BrokerUnavailable,))
def show() -> Response:
    """Say how much is kept, and what it has saved."""
    here = services()
    settings = here.settings.cache
    entries, size = here.cache.size()
    models = here.repository.models
    versions = [(model.name, version) for model in models.values() for version in model.versions]
    counts = {name: dict.fromkeys(COUNTED, 0) for name in models}
    for (name, _), found in zip(versions, here.statistics.read_all(versions), strict=True):
        for counted in COUNTED:
            counts[name][counted] += getattr(found, counted)
    document = {
        "entries": entries,
        "bytes": size,
        "max_entries": settings.max_entries,
        "max_bytes": settings.max_bytes,
        "models": [{"model": name, **counted} for name, counted in counts.items()],
    }
    return documents.respond(document)


@blueprint.delete("/cache")
@describe({200: Cleared}, errors=(BrokerUnavailable,), query=(ClearQuery,))
def clear() -> Response:
    """Forget what is kept, of all models or of one."""
    return documents.respond({"cleared": services().cache.clear(read(ClearQuery).model)})
