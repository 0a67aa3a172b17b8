"""Kept results, for operators."""

from __future__ import annotations

from typing import Annotated, TypedDict

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from inferno.errors import BrokerUnavailable
from web.calls import documents
from web.calls.parameters import read
from web.openapi.describe import describe
from web.services import services

blueprint = Blueprint("cache", __name__)

#: The counters of each model that are shown; names of `VersionStatistics`.
COUNTED = ("hits", "misses", "coalesced", "deduplicated")


class ClearQuery(msgspec.Struct):
    """Which results are deleted."""

    model: Annotated[str | None, Meta(description="Only this model's results.")] = None


class ModelCounts(TypedDict):
    """Numbers of a model's tasks since Redis was empty."""

    model: Annotated[str, Meta(examples=["sentiment"])]
    hits: Annotated[int, Meta(description="Tasks answered with a kept result.")]
    misses: Annotated[int, Meta(description="Tasks that had to be computed.")]
    coalesced: Annotated[
        int, Meta(description="Tasks answered with the result of an equal task in flight.")
    ]
    deduplicated: Annotated[int, Meta(description="Tasks that shared one computation in a batch.")]


class Kept(TypedDict):
    """Number and size of the kept results, and what they have saved."""

    entries: int
    bytes: int
    max_entries: int
    max_bytes: int
    models: list[ModelCounts]


class Cleared(TypedDict):
    """What was deleted."""

    cleared: Annotated[int, Meta(description="Number of deleted results.")]


@blueprint.get("/cache")
@describe({200: Kept}, errors=(BrokerUnavailable,))
def show() -> Response:
    """Show how much is kept, and what it has saved."""
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
    """Delete the kept results of all models or of one."""
    return documents.respond({"cleared": services().cache.clear(read(ClearQuery).model)})
