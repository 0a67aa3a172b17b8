"""All steps in a worker: report the members of batches to Celery, on the worker's event loop.

So `celery inspect`, Flower and warm shutdown see every task; celery-batches reports nothing. The
reports equal those of Celery's own `strategy.default` and `Request`, for many members at once: one
by one, events would cost more than all the rest of a short task.
"""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson
from celery import signals
from celery.utils.saferepr import saferepr
from celery.utils.time import utcoffset
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu import serialization
from kombu.asynchronous.timer import Entry

from inferno.protocol.tasks import TaskState
from inferno.settings import EventSettings
from workers.batches.settlement import Settled

#: How long an event may wait to be published with others, in seconds.
LINGER_S = 0.1
#: Number of events that are published at once.
LINGER_EVENTS = 512
#: Pause without events after nobody has listened, in seconds.
SILENCE_S = 1.0

# Celery's JSON format, written by a faster library.
serialization.register(
    "fast-json",
    lambda value: orjson.dumps(value, default=str).decode(),
    None,
    content_type="application/json",
    content_encoding="utf-8",
)


class Events:
    """Reports to Celery and its listeners; replaced with each connection to the broker."""

    def __init__(self, consumer: Consumer, settings: EventSettings) -> None:
        """Make Celery publish events in groups; by default it publishes after each message.

        Args:
          consumer: the worker's consumer.
          settings: whether events are sent, and for how many tasks.
        """
        self._consumer = consumer
        self._settings = settings
        self._dispatcher = consumer.event_dispatcher
        self._timer: list[Entry] = []
        self._silent_until = float("-inf")
        if self._dispatcher is not None:
            self._dispatcher.serializer = "fast-json"
            self._dispatcher.buffer_limit = LINGER_EVENTS
            self._dispatcher.on_send_buffered = self._buffered

    def received(self, requests: Iterable[Request]) -> None:
        """Report that tasks were fetched from their lane."""
        for request in requests:
            state.task_reserved(request)
            signals.task_received.send(sender=self._consumer, request=request)
        self._send(requests, "task-received", _received)

    def started(self, requests: Sequence[Request]) -> None:
        """Report that a batch was started."""
        pid, now = os.getpid(), time.time()
        # Equals `state.task_accepted` for each task, but counts all at once.
        for request in requests:
            request.worker_pid, request.time_start = pid, now
            state.active_requests.add(request)
        state.total_count.update(request.name for request in requests)
        state.all_total_count[0] += len(requests)
        self._send(requests, "task-started", lambda _: {})

    def ended(self, settled: Iterable[Settled]) -> None:
        """Report settled members."""
        succeeded: dict[Request, Settled] = {}
        for item in settled:
            request = item.member.request
            # Celery's set of successful tasks stays empty: only Celery's own runs need it.
            state.task_ready(request)
            if item.state is TaskState.SUCCEEDED:
                succeeded[request] = item
            else:
                self._report_failure(request, item)
        self._send(
            succeeded,
            "task-succeeded",
            lambda request: {"result": "", "runtime": succeeded[request].runtime},
        )

    def flush(self) -> None:
        """Publish the events that have gathered."""
        self._timer.clear()
        dispatcher = self._dispatcher
        if dispatcher is None:
            return
        published = bool(dispatcher._group_buffer["task"])
        dispatcher.flush()
        # Only our transport knows whether anyone listens.
        audience = getattr(dispatcher.producer.channel, "audience", {})
        nobody = audience.get(dispatcher.exchange.name) == 0
        if published and nobody and self._settings.send == "auto":
            self._silent_until = time.monotonic() + SILENCE_S

    def _report_failure(self, request: Request, item: Settled) -> None:
        error = item.error
        fields: dict[str, Any]
        if item.state is TaskState.RETRYING:
            text = f"{saferepr(error)}; next attempt in {item.delay_s:.3g} s"
            fields = {"exception": text, "traceback": ""}
            self._send([request], "task-retried", lambda _: fields)
        elif item.state is TaskState.EXPIRED:
            fields = {"terminated": False, "signum": None, "expired": True}
            self._send([request], "task-revoked", lambda _: fields)
        elif error is not None:
            text = "".join(traceback.format_exception(error))
            fields = {"exception": saferepr(error), "traceback": text}
            self._send([request], "task-failed", lambda _: fields)

    def _send(
        self, requests: Iterable[Request], kind: str, fields: Callable[[Request], dict[str, Any]]
    ) -> None:
        dispatcher = self._dispatcher
        if dispatcher is None or not dispatcher.enabled or self._settings.send == "never":
            return
        now = time.time()
        if time.monotonic() < self._silent_until or (
            dispatcher.groups and "task" not in dispatcher.groups
        ):
            return
        common = {
            "type": kind,
            "hostname": dispatcher.hostname,
            "utcoffset": utcoffset(),
            "pid": dispatcher.pid,
            "clock": dispatcher.clock.forward(),
            "timestamp": now,
        }
        waiting = dispatcher._group_buffer["task"]
        waiting += [
            {**common, "uuid": request.id, **fields(request)}
            for request in requests
            if self._is_in_sample(request.id)
        ]
        if len(waiting) >= LINGER_EVENTS:
            self.flush()
        elif waiting:
            self._buffered()

    def _is_in_sample(self, task_id: str) -> bool:
        """Return whether events of a task are sent; the same for all events of the task."""
        sample = self._settings.sample
        return sample >= 1 or random.Random(task_id).random() < sample

    def _buffered(self) -> None:
        if not self._timer:
            self._timer.append(self._consumer.timer.call_after(LINGER_S, self.flush))


def _received(request: Request) -> dict[str, Any]:
    return {
        "name": request.name,
        "args": request.argsrepr,
        "kwargs": request.kwargsrepr,
        "root_id": request.root_id,
        "parent_id": request.parent_id,
        "retries": request.request_dict.get("retries", 0),
        "eta": request.eta and request.eta.isoformat(),
        "expires": request.expires and request.expires.isoformat(),
    }
