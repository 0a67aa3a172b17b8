"""The lanes of the models, for operators."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response

from web import documents, paging
from web.services import Services, services

blueprint = Blueprint("lanes", __name__)


@blueprint.get("/lanes")
def index() -> Response:
    """Say of every model how much is in its lane."""
    here = services()
    return documents.respond({"lanes": [_lane(here, name) for name in here.repository.models]})


@blueprint.get("/lanes/<model>")
def show(model: str) -> Response:
    """Say how much is in one lane."""
    here = services()
    here.repository.model(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/pause")
def pause(model: str) -> Response:
    """Hand out nothing more of a lane; tasks are still accepted."""
    here = services()
    here.repository.model(model)
    here.control.lanes.pause(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/resume")
def resume(model: str) -> Response:
    """Hand out a paused lane again."""
    here = services()
    here.repository.model(model)
    here.control.lanes.resume(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/purge")
def purge(model: str) -> Response:
    """Cancel what waits in a lane, if it is as much as the client thinks."""
    here = services()
    here.repository.model(model)
    cancelled = here.control.purge(model, paging.confirmed())
    return documents.respond({"model": model, "cancelled": cancelled})


def _lane(here: Services, model: str) -> dict[str, Any]:
    lanes = here.control.lanes
    backlog = lanes.backlog(model)
    return {
        "model": model,
        "waiting": backlog.waiting,
        "held": backlog.held,
        "delayed": backlog.delayed,
        "paused": lanes.paused(model),
    }
