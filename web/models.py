"""What can be served, and what is ready."""

from __future__ import annotations

from typing import Any

import msgspec
from flask import Blueprint, Response, request

from inferno.protocol.deployments import parse_activate, parse_load, parse_unload
from inferno.repository import MANIFEST, Model, Package
from inferno.settings import BatchingSettings
from tasks.cluster import WorkerReport
from web import documents
from web.services import Services, services

blueprint = Blueprint("models", __name__)


@blueprint.get("/models")
def index() -> Response:
    """List the models in the shapes that OpenAI's clients and others expect, in one document."""
    here = services()
    repository, loaded, failed = here.catalog.refresh(), here.loaded(), here.failed()
    models = [summary(model, loaded, failed) for model in repository.models.values()]
    document = {
        "object": "list",
        "data": models,
        "models": models,
        "broken": repository.errors,
    }
    return documents.respond(document)


@blueprint.get("/models/<name>")
def show(name: str) -> Response:
    """Describe one model with its full signature; its first use may begin to load it."""
    here = services()
    model = here.catalog.refresh().model(name)
    loaded = here.loaded()
    if model.active is not None and not loaded.get(name, {model.active}):
        here.deployments.nudge(name, model.active)
    return documents.respond(
        detail(model, loaded, here.failed(), here.settings.batching)
        | {"workers": _workers(here.cluster.serving(name), name)}
    )


@blueprint.get("/models/<name>/active")
def active(name: str) -> Response:
    """Say which versions answer those who name none, and whether they are loaded."""
    here = services()
    return documents.respond(_active(here, here.catalog.refresh().model(name)))


@blueprint.route("/models/<name>/active", methods=["POST", "PUT"])
def activate(name: str) -> Response:
    """Let other versions answer those who name none, as soon as all workers have loaded them."""
    here = services()
    model = here.catalog.refresh().model(name)
    body = parse_activate(request.get_data())
    if isinstance(body.version, str):
        here.rollouts.load(model, None)
    else:
        here.rollouts.activate(model, body.shares)
    return documents.respond(_active(here, here.catalog.refresh().model(name)))


@blueprint.post("/models:load")
def load() -> Response:
    """Load a version in all workers; unless the body says otherwise, it answers from then on."""
    here = services()
    body = parse_load(request.get_data())
    model = here.catalog.refresh().model(body.name)
    version = None if isinstance(body.version, str) else body.version
    version = here.rollouts.load(model, version, activate=body.activate)
    model = here.catalog.refresh().model(body.name)
    document = {"loaded": True, "name": body.name, "version": version, "active": model.active}
    workers = _workers(here.cluster.serving(body.name, 0.0), body.name, version)
    return documents.respond(document | {"workers": workers})


@blueprint.post("/models:unload")
def unload() -> Response:
    """Take a version, or all of a model, out of service and out of the workers' memory."""
    here = services()
    body = parse_unload(request.get_data())
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
    """Return what each worker has of a model, or of one version of it."""
    return [
        {"worker": report.worker, "device": report.device, "version": held_version}
        | msgspec.to_builtins(held)
        for report in reports
        for held_version, held in sorted(report.held.get(name, {}).items())
        if version in (None, held_version)
    ]


def summary(
    model: Model, loaded: dict[str, set[int]], failed: dict[str, dict[int, str]]
) -> dict[str, Any]:
    """Return what a list says of a model.

    Args:
      model: from the repository.
      loaded: versions by model that ready workers have loaded.
      failed: why a worker could not load a version, by model and version.
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
        "ready": model.name in loaded and model.active is not None,
    }


def detail(
    model: Model,
    loaded: dict[str, set[int]],
    failed: dict[str, dict[int, str]],
    defaults: BatchingSettings,
) -> dict[str, Any]:
    """Return everything that a client may want to know of a model."""
    manifest = model.described.manifest
    return summary(model, loaded, failed) | {
        "format": manifest.format,
        "signature": manifest.signature.model_dump(mode="json", exclude_none=True),
        "labels": list(manifest.labels),
        "batching": batching(model.described, defaults),
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
