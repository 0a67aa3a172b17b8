"""The lanes of models, for operators."""

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
from web.openapi.describe import describe
from web.services import Services, services

blueprint = Blueprint("lanes", __name__)


class Lane(TypedDict):
    """How much is in a lane."""

    model: Annotated[str, Meta(description="Model of the lane.", examples=["sentiment"])]
    waiting: Annotated[int, Meta(description="Tasks that no worker has fetched yet.")]
    held: Annotated[
        int, Meta(description="Tasks that workers have fetched: buffered, or in a forward pass.")
    ]
    delayed: Annotated[int, Meta(description="Tasks that wait for their next attempt.")]
    paused: Annotated[bool, Meta(description="Whether workers get no further tasks.")]


class LaneList(TypedDict):
    """The lanes of all models."""

    lanes: list[Lane]


class Purged(TypedDict):
    """The tasks that were cancelled in a lane."""

    model: Annotated[str, Meta(examples=["sentiment"])]
    cancelled: Annotated[int, Meta(description="Number of cancelled tasks.")]


_ERRORS = (ModelNotFound, NotSupported, BrokerUnavailable)


@blueprint.get("/lanes")
@describe({200: LaneList}, errors=(NotSupported, BrokerUnavailable))
def index() -> Response:
    """Show how much is in the lane of each model."""
    here = services()
    return documents.respond({"lanes": [_lane(here, name) for name in here.repository.models]})


@blueprint.get("/lanes/<model>")
@describe({200: Lane}, errors=_ERRORS)
def show(model: str) -> Response:
    """Show how much is in one lane."""
    here = services()
    here.repository.model(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/pause")
@describe({200: Lane}, errors=_ERRORS)
def pause(model: str) -> Response:
    """Stop giving tasks of a lane to workers; tasks are still accepted."""
    here = services()
    here.repository.model(model)
    here.control.lanes.pause(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/resume")
@describe({200: Lane}, errors=_ERRORS)
def resume(model: str) -> Response:
    """Give tasks of a paused lane to workers again."""
    here = services()
    here.repository.model(model)
    here.control.lanes.resume(model)
    return documents.respond(_lane(here, model))


@blueprint.post("/lanes/<model>/purge")
@describe({200: Purged}, errors=(InvalidRequest, NotConfirmed, *_ERRORS), query=(paging.Confirmed,))
def purge(model: str) -> Response:
    """Cancel the tasks that wait in a lane, if their number is the expected one."""
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
