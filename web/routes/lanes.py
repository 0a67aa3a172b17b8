"""The lanes of the models, for operators."""

from __future__ import annotations

from typing import Annotated, TypedDict

from flask import Blueprint, Response
from msgspec import Meta

from inferno.errors import (
    BrokerUnavailable,
    InvalidRequest,
    ModelNotFound,
    NotConfirmed,
    NotSupported,
)
from web.calls import documents, paging
from web.calls.parameters import read
from web.openapi.document import describe
from web.services import Services, services

blueprint = Blueprint("lanes", __name__)


class Lane(TypedDict):
    """How much is in a lane."""

    model: Annotated[str, Meta(description="Whose lane it is.", examples=["sentiment"])]
    waiting: Annotated[int, Meta(description="Tasks that no worker has taken yet.")]
    held: Annotated[
        int, Meta(description="Tasks in workers' hands: buffered, or in a forward pass.")
    ]
    delayed: Annotated[int, Meta(description="Tasks that wait for their next attempt.")]
    paused: Annotated[bool, Meta(description="Whether workers are given nothing more.")]


class LaneList(TypedDict):
    """The lanes of all models."""

    lanes: list[Lane]


class Purged(TypedDict):
    """What was cancelled in a lane."""

    model: Annotated[str, Meta(examples=["sentiment"])]
    cancelled: Annotated[int, Meta(description="How many tasks.")]


_ERRORS = (ModelNotFound, NotSupported, BrokerUnavailable)


@blueprint.get("/lanes")
@describe({200: LaneList}, errors=(NotSupported, BrokerUnavailable))
def index() -> Response:
    """Say of every model how much is in its lane."""
    here = services()
    return documents.respond({"lanes": [_lane(here, name) for name in here.repository.models]})


@blueprint.get("/lanes/<model>")
@describe({200: Lane}, errors=_ERRORS)
def show(model: str) -> Response:
    """Say how much is in one lane."""
    here = services()
    here.repository.model(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/pause")
@describe({200: Lane}, errors=_ERRORS)
def pause(model: str) -> Response:
    """Hand out nothing more of a lane; tasks are still accepted."""
    here = services()
    here.repository.model(model)
    here.control.lanes.pause(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/resume")
@describe({200: Lane}, errors=_ERRORS)
def resume(model: str) -> Response:
    """Hand out a paused lane again."""
    here = services()
    here.repository.model(model)
    here.control.lanes.resume(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/purge")
@describe({200: Purged}, errors=(InvalidRequest, NotConfirmed, *_ERRORS), query=(paging.Confirmed,))
def purge(model: str) -> Response:
    """Cancel what waits in a lane, if it is as much as the client thinks."""
    here = services()
    here.repository.model(model)
    cancelled = here.control.purge(model, read(paging.Confirmed).confirm)
    return documents.respond({"model": model, "cancelled": cancelled})


def _lane(here: Services, model: str) -> Lane:
    lanes = here.control.lanes
    backlog = lanes.backlog(model)
    return {
        "model": model,
        "waiting": backlog.waiting,
        "held": backlog.held,
        "delayed": backlog.delayed,
        "paused": lanes.paused(model),
    }
