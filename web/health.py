"""Whether the platform is alive and ready, for people, load balancers and orchestrators."""

from __future__ import annotations

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
        missing = missing_models(here)
    except BrokerUnavailable as exc:
        return documents.respond({"status": "degraded", "redis": "down", "detail": exc.detail}, 503)
    document = {
        "status": "degraded" if missing else "ok",
        "redis": "ok",
        "models": {name: name not in missing for name in here.repository.models},
        "workers_active": workers,
    }
    return documents.respond(document)


@blueprint.get("/health/live")
def live() -> Response:
    """Say that this process answers."""
    return documents.respond({"status": "live"})


@blueprint.get("/health/ready")
def ready() -> Response:
    """Say whether every model of the repository is served."""
    here = services()
    try:
        missing = missing_models(here)
    except BrokerUnavailable as exc:
        return documents.respond(
            {"status": "not ready", "redis": "down", "detail": exc.detail}, 503
        )
    if missing:
        detail = f"no live worker serves {', '.join(missing)}"
        return documents.respond({"status": "not ready", "missing": missing, "detail": detail}, 503)
    return documents.respond({"status": "ready"})


def missing_models(here: Services) -> list[str]:
    """Return the models that no ready worker serves.

    Raises:
      BrokerUnavailable: Redis does not answer.
    """
    loaded = here.loaded()
    return [name for name in here.repository.models if name not in loaded]
