"""What can be served, and what is ready."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response

from inferno.repository import MANIFEST, Model, Package
from inferno.settings import BatchingSettings
from web import documents
from web.services import services

blueprint = Blueprint("models", __name__)


@blueprint.get("/models")
def index() -> Response:
    """List the models in the shapes that OpenAI's clients and others expect, in one document."""
    here = services()
    loaded = here.loaded()
    models = [summary(model, loaded) for model in here.repository.models.values()]
    document = {
        "object": "list",
        "data": models,
        "models": models,
        "broken": here.repository.errors,
    }
    return documents.respond(document)


@blueprint.get("/models/<name>")
def show(name: str) -> Response:
    """Describe one model with its full signature."""
    here = services()
    model = here.repository.model(name)
    return documents.respond(detail(model, here.loaded(), here.settings.batching))


@blueprint.get("/models/<name>/active")
def active(name: str) -> Response:
    """Say which version answers those who name none, and whether it is loaded."""
    here = services()
    model = here.repository.model(name)
    versions = here.loaded().get(name, set())
    return documents.respond(
        {"name": name, "version": model.active, "loaded": model.active in versions}
    )


def summary(model: Model, loaded: dict[str, set[int]]) -> dict[str, Any]:
    """Return what a list says of a model.

    Args:
      model: from the repository.
      loaded: versions by model that ready workers have loaded.
    """
    package = model.package()
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
        "ready": model.name in loaded,
    }


def detail(model: Model, loaded: dict[str, set[int]], defaults: BatchingSettings) -> dict[str, Any]:
    """Return everything that a client may want to know of a model."""
    manifest = model.package().manifest
    return summary(model, loaded) | {
        "format": manifest.format,
        "signature": manifest.signature.model_dump(mode="json", exclude_none=True),
        "labels": list(manifest.labels),
        "batching": batching(model.package(), defaults),
        "codec": manifest.codecs.default,
        "example": {"model": model.name, "inputs": manifest.warm_up.inputs},
        "broken_versions": dict(model.errors),
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
