"""Callers that hang up while they wait, and what becomes of their tasks."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from typing import Any, cast

import redis

from inferno import names
from inferno.errors import TaskNotFound, WrongState
from tasks.broker.connection import translated
from tasks.control.tasks import Control
from tasks.results.bridge import Waiter
from tasks.state.outcomes import Outcome

log = logging.getLogger(__name__)

#: How often a waiting call looks for its client, in seconds.
LOOK_S = 0.5
#: How long the channel of a result may take to be left, in seconds.
LEAVE_S = 2.0
#: How often that is asked, in seconds.
ASK_S = 0.1

#: Where WSGI servers put the connection of a request.
_SOCKETS = ("gunicorn.socket", "werkzeug.socket")


class Disconnected(Exception):
    """The caller that waited for a task has hung up."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id)
        self.task_id = task_id


def has_hung_up(sock: socket.socket) -> bool:
    """Return whether a client has closed its connection; what else it sent stays unread."""
    timeout = sock.gettimeout()
    # Also gevent's sockets, for which MSG_DONTWAIT means nothing, do not wait then.
    sock.settimeout(0)
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, ValueError):
        # Nothing has come; or it is TLS, which cannot look ahead.
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(timeout)


def socket_of(environ: Mapping[str, Any]) -> socket.socket | None:
    """Return the connection of a WSGI request, where its server tells."""
    return next((environ[name] for name in _SOCKETS if name in environ), None)


def wait(
    waiter: Waiter, task_id: str, timeout_s: float, sock: socket.socket | None
) -> Outcome | None:
    """Wait for a task as `Waiter.wait` does, and look for the caller meanwhile.

    Args:
      waiter: for the task.
      task_id: which it is.
      timeout_s: how long, in seconds.
      sock: the caller's connection; without it, nobody is looked for.
    Raises:
      Disconnected: the caller has hung up.
    """
    if sock is None:
        return waiter.wait(timeout_s)
    end = time.monotonic() + timeout_s
    while True:
        left_s = end - time.monotonic()
        outcome = waiter.wait(min(left_s, LOOK_S))
        if outcome is not None or left_s <= LOOK_S:
            return outcome
        if has_hung_up(sock):
            raise Disconnected(task_id)


def cancel_unwanted(task_id: str, client: redis.Redis, control: Control) -> bool:
    """Cancel a task unless somebody waits for it, in this process or another; says whether.

    Its caller must have stopped waiting: of two that hang up together, neither is then kept by the
    other. This process leaves the channel of the result a moment after that.

    Raises:
      BrokerUnavailable: Redis does not answer.
    """
    channel = names.result_key(task_id)
    end = time.monotonic() + LEAVE_S
    while True:
        with translated():
            counts = cast(list[tuple[bytes, int]], client.pubsub_numsub(channel))
        if counts[0][1] == 0:
            break
        if time.monotonic() > end:
            log.info("task %s: its caller has hung up, and somebody else waits for it", task_id)
            return False
        time.sleep(ASK_S)
    try:
        control.cancel(task_id)
    except (TaskNotFound, WrongState):
        return False  # It is over already.
    log.info("task %s: its caller has hung up, and it was cancelled", task_id)
    return True
