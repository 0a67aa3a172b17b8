"""What Celery is told of each member of a batch.

So `celery inspect`, Flower and warm shutdown see the truth; celery-batches tells nothing. The calls
are those of Celery's own `strategy.default` and `Request`; all run on the worker's event loop.
"""

from __future__ import annotations

import os
import time
import traceback

from celery import signals
from celery.utils.saferepr import saferepr
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu.asynchronous.timer import Entry

from inferno.protocol.tasks import TaskState
from tasks.settle import Settled

#: How long an event may wait for others to be published with, in seconds.
LINGER_S = 0.1
#: So many do not wait.
LINGER_EVENTS = 256


def coalesce(consumer: Consumer) -> None:
    """Have events published in groups; by itself Celery publishes them after each message."""
    dispatcher = consumer.event_dispatcher
    if dispatcher is None:
        return
    timer: list[Entry] = []

    def flush() -> None:
        timer.clear()
        dispatcher.flush()

    def buffered() -> None:
        if not timer:
            timer.append(consumer.timer.call_after(LINGER_S, flush))

    dispatcher.buffer_limit = LINGER_EVENTS
    dispatcher.on_send_buffered = buffered


def received(consumer: Consumer, request: Request) -> None:
    """A task has come out of its lane."""
    state.task_reserved(request)
    signals.task_received.send(sender=consumer, request=request)
    request.send_event(
        "task-received",
        name=request.name,
        args=request.argsrepr,
        kwargs=request.kwargsrepr,
        root_id=request.root_id,
        parent_id=request.parent_id,
        retries=request.request_dict.get("retries", 0),
        eta=request.eta and request.eta.isoformat(),
        expires=request.expires and request.expires.isoformat(),
    )


def started(request: Request) -> None:
    """Its forward pass starts."""
    request.on_accepted(os.getpid(), time.monotonic())


def ended(settled: Settled) -> None:
    """It is settled."""
    request = settled.member.request
    state.task_ready(request, successful=settled.state is TaskState.SUCCEEDED)
    error = settled.error
    if settled.state is TaskState.SUCCEEDED:
        request.send_event("task-succeeded", result="", runtime=settled.runtime)
    elif settled.state is TaskState.RETRYING:
        text = f"{saferepr(error)}; next attempt in {settled.delay_s:.3g} s"
        request.send_event("task-retried", exception=text, traceback="")
    elif settled.state is TaskState.EXPIRED:
        request.send_event("task-revoked", terminated=False, signum=None, expired=True)
    elif error is not None:
        text = "".join(traceback.format_exception(error))
        request.send_event("task-failed", exception=saferepr(error), traceback=text)
