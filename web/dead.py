"""Dead letters: tasks that were given up after every attempt."""

from __future__ import annotations

from flask import Blueprint, Response, request

from inferno.errors import PayloadGone
from inferno.protocol.webhooks import parse_address
from tasks.dead import DeadLetter
from web import documents, paging
from web.services import services
from web.tasks import repeated

blueprint = Blueprint("dead", __name__)


@blueprint.get("/dead")
def index() -> Response:
    """List the newest dead letters."""
    here = services()
    page = here.dead.newest(paging.limit(), _wanted, paging.place())
    letters = [documents.dead_letter(letter) for letter in page.items]
    return documents.respond(
        {"dead": letters, "count": here.dead.count(), "next": paging.cursor(page)}
    )


@blueprint.get("/dead/<task_id>")
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
    return documents.respond(documents.dead_letter(letter) | more)


@blueprint.post("/dead/<task_id>/replay")
def replay(task_id: str) -> Response:
    """Run one again, as a new task, and discard its letter."""
    here = services()
    letter = here.dead.show(task_id)
    # Without its model, the new task would wait for ever.
    here.repository.model(letter.model)
    return repeated(here.dead.replay(letter), task_id)


@blueprint.post("/dead/replay")
def replay_all() -> Response:
    """Run all again, or those of one model; those whose model or inputs are gone stay there."""
    here = services()
    tasks, left = [], 0
    for letter in filter(_wanted, here.dead.all()):
        if letter.model not in here.repository.models:
            left += 1
            continue
        try:
            task = here.dead.replay(letter)
        except PayloadGone:
            left += 1
        else:
            tasks.append({"task_id": task.task_id, "replay_of": letter.task_id})
    return documents.respond({"replayed": len(tasks), "left": left, "tasks": tasks}, 202)


@blueprint.delete("/dead/<task_id>")
def discard(task_id: str) -> Response:
    """Delete one."""
    services().dead.discard(task_id)
    return documents.respond({"discarded": 1})


@blueprint.delete("/dead")
def discard_all() -> Response:
    """Delete all, or those of one model, if there are as many as the client thinks."""
    model = request.args.get("model")
    discarded = services().dead.discard_all(paging.confirmed(), model)
    return documents.respond({"discarded": discarded})


def _wanted(letter: DeadLetter) -> bool:
    return request.args.get("model") in (None, letter.model)
