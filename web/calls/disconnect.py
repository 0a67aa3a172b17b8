"""Clients that leave while they wait: how that is noticed, and what becomes of their tasks."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from inferno.errors import TaskNotFound, WrongState
from tasks.gateway import Gateway
from tasks.results.bridge import Waiter
from tasks.state.outcomes import Outcome

log = logging.getLogger(__name__)

#: Pause between two checks whether the client of a waiting call is there, in seconds.
LOOK_S = 0.5
#: How long the bridge may take to leave the channel of a result, in seconds.
LEAVE_S = 2.0
#: Pause between two checks whether it has left the channel, in seconds.
ASK_S = 0.1

#: Where WSGI servers put the connection of a request.
_SOCKETS = ("gunicorn.socket", "werkzeug.socket")


class Disconnected(Exception):
    """The client of a waiting call has closed its connection."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id)
        self.task_id = task_id


def has_hung_up(sock: socket.socket) -> bool:
    """Return whether a client has closed its connection; bytes that it sent stay unread."""
    timeout = sock.gettimeout()
    # A timeout of 0 works for gevent's sockets too; MSG_DONTWAIT does not.
    sock.settimeout(0)
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, ValueError):
        # Nothing has come; or the socket uses TLS, which cannot peek.
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(timeout)


def is_cut(sock: socket.socket) -> bool:
    """Return whether nothing can be sent to a client any more: one side has reset the connection.

    A client that has only ended its own side still gets its answer.
    """
    timeout = sock.gettimeout()
    sock.settimeout(0)
    try:
        sock.send(b"")
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(timeout)
    return False


def socket_of(environ: Mapping[str, Any]) -> socket.socket | None:
    """Return the connection of a WSGI request, if its server reveals it."""
    return next((environ[name] for name in _SOCKETS if name in environ), None)


def wait(
    waiter: Waiter,
    task_id: str,
    timeout_s: float,
    sock: socket.socket | None,
    has_left: Callable[[socket.socket], bool],
) -> Outcome | None:
    """Wait for a task as `Waiter.wait` does, and check meanwhile that the client is there.

    Args:
      waiter: the waiter of the task.
      task_id: id of the task.
      timeout_s: longest wait, in seconds.
      sock: the client's connection; None to check nothing.
      has_left: `has_hung_up` or `is_cut`.
    Raises:
      Disconnected: the client has left.
    """
    if sock is None:
        return waiter.wait(timeout_s)
    end = time.monotonic() + timeout_s
    while True:
        left_s = end - time.monotonic()
        outcome = waiter.wait(min(left_s, LOOK_S))
        if outcome is not None or left_s <= LOOK_S:
            return outcome
        if has_left(sock):
            raise Disconnected(task_id)


def cancel_unwanted(task_id: str, gateway: Gateway) -> bool:
    """Cancel a task unless a caller in this or another process awaits it; return whether it was.

    The call that gives up must have stopped waiting: if two give up together, neither may keep the
    task for the other. The bridge leaves the channel of the result a moment later.

    Raises:
      BrokerUnavailable: Redis does not answer.
    """
    end = time.monotonic() + LEAVE_S
    while gateway.listeners(task_id):
        if time.monotonic() > end:
            log.info("task %s: its client has left, but another caller awaits it", task_id)
            return False
        time.sleep(ASK_S)
    try:
        gateway.control.cancel(task_id)
    except (TaskNotFound, WrongState):
        return False  # The task is over.
    log.info("task %s: its client has left, and it was cancelled", task_id)
    return True
