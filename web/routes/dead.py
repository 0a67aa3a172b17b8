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
from web.openapi.describe import describe
from web.routes.tasks import REPEATED
from web.services import services

blueprint = Blueprint("dead", __name__)


class OfModel(msgspec.Struct):
    """Which dead letters are replayed."""

    model: Annotated[str | None, Meta(description="Only this model's letters.")] = None


class DiscardQuery(paging.Confirmed):
    """Which dead letters are discarded."""

    model: Annotated[str | None, Meta(description="Only this model's letters.")] = None


class DeadLetterList(TypedDict):
    """Dead letters, newest first."""

    dead: list[DeadLetterSummary]
    count: Annotated[int, Meta(description="Total number of dead letters.")]
    next: paging.Next


class DeadLetterView(DeadLetterSummary):
    """A dead letter with its traceback and payload."""

    traceback: Annotated[str, Meta(description="Where the last error was raised.")]
    payload: Annotated[dict[str, Any], Meta(description="Arguments of the task.")]


class Replay(TypedDict):
    """A dead task that was run again."""

    task_id: Annotated[str, Meta(description="Id of the new task.")]
    replay_of: ReplayOf


class Replayed(TypedDict):
    """What was run again."""

    replayed: Annotated[int, Meta(description="Number of new tasks.")]
    left: Annotated[
        int, Meta(description="Number of letters that stay because their model or inputs are gone.")
    ]
    tasks: list[Replay]


class Discarded(TypedDict):
    """What was deleted."""

    discarded: Annotated[int, Meta(description="Number of deleted letters.")]


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
    """Show a dead letter with its traceback and the arguments of its task."""
    here = services()
    letter = here.dead.show(task_id)
    payload = here.dead.asked(letter)
    if "webhook" in payload:
        # The path of a webhook may hold a token.
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
    """Run a dead task again, as a new task, and discard its letter."""
    here = services()
    letter = here.dead.show(task_id)
    # Without its model, the new task would wait for ever.
    here.repository.model(letter.model)
    return documents.respond_accepted(here.replay.replay(letter), replay_of=task_id)


@blueprint.post("/dead/replay")
@describe({202: Replayed}, errors=(BrokerUnavailable, FateUnknown), query=(OfModel,))
def replay_all() -> Response:
    """Run all dead tasks again, or one model's; letters without model or inputs stay."""
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
    """Delete a dead letter."""
    services().dead.discard(task_id)
    return documents.respond({"discarded": 1})


@blueprint.delete("/dead")
@describe(
    {200: Discarded},
    errors=(InvalidRequest, NotConfirmed, BrokerUnavailable),
    query=(DiscardQuery,),
)
def discard_all() -> Response:
    """Delete all dead letters, or one model's, if the number is the expected one."""
    query = read(DiscardQuery)
    discarded = services().dead.discard_all(query.confirm, query.model)
    return documents.respond({"discarded": discarded})


def _of(model: str | None) -> Callable[[DeadLetter], bool]:
    return lambda letter: model in (None, letter.model)
