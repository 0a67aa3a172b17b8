"""The kept results, for operators."""

from __future__ import annotations

from flask import Blueprint, Response, request

from web import documents
from web.services import services

blueprint = Blueprint("cache", __name__)

#: What is shown of each model; names of `VersionStatistics`.
COUNTED = ("hits", "misses", "coalesced", "deduplicated")


@blueprint.get("/cache")
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
def clear() -> Response:
    """Forget what is kept, of all models or of one."""
    return documents.respond({"cleared": services().cache.clear(request.args.get("model"))})
