"""Whether the platform is alive and ready, for people, load balancers and orchestrators."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response

from inferno.errors import BrokerUnavailable
from web import documents
from web.services import Services, services

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
def health() -> Response:
    """Summarise the platform: 503 only when nothing can be accepted."""
    here = services()
    try:
        workers = len(here.cluster.workers())
        missing = _missing(here)
    except BrokerUnavailable as exc:
        return _respond({"status": "degraded", "redis": "down", "detail": exc.detail}, 503)
    document = {
        "status": "degraded" if missing else "ok",
        "redis": "ok",
        "models": {name: name not in missing for name in here.repository.models},
        "workers_active": workers,
    }
    return _respond(document, 200)


@blueprint.get("/health/live")
def live() -> Response:
    """Say that this process answers."""
    return _respond({"status": "live"}, 200)


@blueprint.get("/health/ready")
def ready() -> Response:
    """Say whether every model of the repository is served."""
    here = services()
    try:
        missing = _missing(here)
    except BrokerUnavailable as exc:
        return _respond({"status": "not ready", "redis": "down", "detail": exc.detail}, 503)
    if missing:
        detail = f"no live worker serves {', '.join(missing)}"
        return _respond({"status": "not ready", "missing": missing, "detail": detail}, 503)
    return _respond({"status": "ready"}, 200)


def _missing(here: Services) -> list[str]:
    loaded = here.loaded()
    return [name for name in here.repository.models if name not in loaded]


def _respond(document: dict[str, Any], status: int) -> Response:
    return Response(documents.encode(document), status, mimetype="application/json")
