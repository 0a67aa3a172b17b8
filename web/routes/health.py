"""Whether the platform is alive and ready, for people, load balancers and orchestrators."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from flask import Blueprint, Response
from msgspec import Meta

from inferno.errors import BrokerUnavailable
from web.calls import documents
from web.openapi.describe import Success, describe
from web.services import services

blueprint = Blueprint("health", __name__)


class Health(TypedDict):
    """The state of the platform."""

    status: Literal["ok", "degraded"]
    redis: Literal["ok", "down"]
    models: NotRequired[
        Annotated[
            dict[str, bool],
            Meta(description="Whether ready workers serve each model, stages included."),
        ]
    ]
    workers_active: NotRequired[Annotated[int, Meta(examples=[5])]]
    detail: NotRequired[Annotated[str, Meta(description="Why Redis does not answer.")]]


class Live(TypedDict):
    """The process answers."""

    status: Literal["live"]


class Ready(TypedDict):
    """Whether every model is served."""

    status: Literal["ready", "not ready"]
    redis: NotRequired[Literal["down"]]
    missing: NotRequired[
        Annotated[
            list[str],
            Meta(
                description="Models that no ready worker serves, and ensembles with such a stage."
            ),
        ]
    ]
    detail: NotRequired[str]


@blueprint.get("/health")
@describe({200: Health, 503: Success(Health, "Nothing can be accepted.")})
def health() -> Response:
    """Summarise the platform; 503 only if nothing can be accepted."""
    here = services()
    try:
        workers = len(here.cluster.workers())
        missing = here.missing_models()
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
@describe({200: Live})
def live() -> Response:
    """Answer, which shows that this process is alive."""
    return documents.respond({"status": "live"})


@blueprint.get("/health/ready")
@describe({200: Ready, 503: Success(Ready, "A model is not served, or Redis does not answer.")})
def ready() -> Response:
    """Tell whether every model of the repository is served."""
    here = services()
    try:
        missing = here.missing_models()
    except BrokerUnavailable as exc:
        return documents.respond(
            {"status": "not ready", "redis": "down", "detail": exc.detail}, 503
        )
    if missing:
        detail = f"no live worker serves {', '.join(missing)}"
        return documents.respond({"status": "not ready", "missing": missing, "detail": detail}, 503)
    return documents.respond({"status": "ready"})
