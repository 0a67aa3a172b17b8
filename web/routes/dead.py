"""Dead letters: tasks that were given up after every attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from inferno.errors import (
    BrokerUnavailable,
    FateUnknown,
    InvalidRequest,
    ModelNotFound,
    NotConfirmed,
    PayloadGone,
    TaskNotFound,
)
from inferno.protocol.webhooks import parse_address
from tasks.results.views import DeadLetterSummary, ReplayOf
from tasks.state.dead import DeadLetter
from web.calls import documents, paging
from web.calls.parameters import read
from web.openapi.document import describe
from web.routes.tasks import REPEATED, repeated
from web.services import services

blueprint = Blueprint("dead", __name__)


class OfModel(msgspec.Struct):
    """Which dead letters are meant."""

    model: Annotated[str | None, Meta(description="Only those of this model.")] = None


class DiscardQuery(paging.Confirmed):
    """Which are discarded."""

    model: Annotated[str | None, Meta(description="Only those of this model.")] = None


class DeadLetterList(TypedDict):
    """Dead letters, newest first."""

    dead: list[DeadLetterSummary]
    count: Annotated[int, Meta(description="How many there are in all.")]
    next: paging.Next


class DeadLetterView(DeadLetterSummary):
    """Everything that is known of a dead letter."""

    traceback: Annotated[str, Meta(description="Where its last error was raised.")]
    payload: Annotated[dict[str, Any], Meta(description="What the task was asked.")]


class Replay(TypedDict):
    """One that was run again."""

    task_id: Annotated[str, Meta(description="The new task's.")]
    replay_of: ReplayOf


class Replayed(TypedDict):
    """What was run again."""

    replayed: Annotated[int, Meta(description="How many.")]
    left: Annotated[int, Meta(description="Letters whose model or inputs are gone.")]
    tasks: list[Replay]


class Discarded(TypedDict):
    """What was deleted."""

    discarded: Annotated[int, Meta(description="How many.")]


@blueprint.get("/dead")
@describe({200: DeadLetterList}, errors=(InvalidRequest, BrokerUnavailable), query=(paging.Paged,))
def index() -> Response:
    """List the newest dead letters."""
    here = services()
    query = read(paging.Paged)
    page = here.dead.newest(query.limit, _of(query.model), paging.place(query.cursor))
    letters = [documents.dead_letter(letter) for letter in page.items]
    return documents.respond(
        {"dead": letters, "count": here.dead.count(), "next": paging.cursor(page)}
    )


@blueprint.get("/dead/<task_id>")
@describe({200: DeadLetterView}, errors=(TaskNotFound, PayloadGone, BrokerUnavailable))
def show(task_id: str) -> Response:
    """Show one with its traceback and what the task was asked."""
    here = services()
    letter = here.dead.show(task_id)
    payload = here.dead.asked(letter)
    if "webhook" in payload:
        # Its path may hold a token.
        url = str(parse_address(payload["webhook"]["url"]))
        payload = payload | {"webhook": payload["webhook"] | {"url": url}}
    more = {"traceback": letter.traceback, "payload": payload}
    return documents.respond({**documents.dead_letter(letter), **more})


@blueprint.post("/dead/<task_id>/replay")
@describe(
    {202: REPEATED},
    errors=(TaskNotFound, ModelNotFound, PayloadGone, BrokerUnavailable, FateUnknown),
)
def replay(task_id: str) -> Response:
    """Run one again, as a new task, and discard its letter."""
    here = services()
    letter = here.dead.show(task_id)
    # Without its model, the new task would wait for ever.
    here.repository.model(letter.model)
    return repeated(here.replay.replay(letter), task_id)


@blueprint.post("/dead/replay")
@describe({202: Replayed}, errors=(BrokerUnavailable, FateUnknown), query=(OfModel,))
def replay_all() -> Response:
    """Run all again, or those of one model; those whose model or inputs are gone stay there."""
    here = services()
    tasks, left = [], 0
    for letter in filter(_of(read(OfModel).model), here.dead.all()):
        if letter.model not in here.repository.models:
            left += 1
            continue
        try:
            task = here.replay.replay(letter)
        except PayloadGone:
            left += 1
        else:
            tasks.append({"task_id": task.task_id, "replay_of": letter.task_id})
    return documents.respond({"replayed": len(tasks), "left": left, "tasks": tasks}, 202)


@blueprint.delete("/dead/<task_id>")
@describe({200: Discarded}, errors=(TaskNotFound, BrokerUnavailable))
def discard(task_id: str) -> Response:
    """Delete one."""
    services().dead.discard(task_id)
    return documents.respond({"discarded": 1})


@blueprint.delete("/dead")
@describe(
    {200: Discarded},
    errors=(InvalidRequest, NotConfirmed, BrokerUnavailable),
    query=(DiscardQuery,),
)
def discard_all() -> Response:
    """Delete all, or those of one model, if there are as many as the client thinks."""
    query = read(DiscardQuery)
    discarded = services().dead.discard_all(query.confirm, query.model)
    return documents.respond({"discarded": discarded})


def _of(model: str | None) -> Callable[[DeadLetter], bool]:
    return lambda letter: model in (None, letter.model)
