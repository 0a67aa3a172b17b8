"""The kept results, for operators."""

from __future__ import annotations

from flask import Blueprint, Response, request

from web import documents
from web.services import services

blueprint = Blueprint("cache", __name__)


@blueprint.get("/cache")
def show() -> Response:
    """Say how much is kept, and what it has saved."""
    here = services()
    settings = here.settings.cache
    entries, size = here.cache.size()
    models = list(here.repository.models)
    counts = here.cache.counts(models)
    document = {
        "entries": entries,
        "bytes": size,
        "max_entries": settings.max_entries,
        "max_bytes": settings.max_bytes,
        "models": [
            {"model": model, **counted} for model, counted in zip(models, counts, strict=True)
        ],
    }
    return documents.respond(document)


@blueprint.delete("/cache")
def clear() -> Response:
    """Forget what is kept, of all models or of one."""
    return documents.respond({"cleared": services().cache.clear(request.args.get("model"))})
