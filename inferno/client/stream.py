"""Many results over one WebSocket: the client's side of *submit* and *deliver* for streams.

A stream keeps up to `STREAM_WINDOW` tasks in flight. The platform reports each task once on a
connection, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

from inferno.client.connection import Socket
from inferno.client.encoding import Request
from inferno.client.results import Result, failed_result, read_result, rebuild
from inferno.errors import InfernoError

#: Tasks of one stream in flight: enough for full batches, and few enough that their results fit
#: into the queue that the server keeps for a socket.
STREAM_WINDOW = 256


class Stream:
    """Submits requests and collects results on one WebSocket."""

    def __init__(
        self,
        socket: Socket,
        encode: Callable[[Request], dict[str, Any]],
        look_up: Callable[[str], dict[str, Any]],
    ) -> None:
        """Store how to talk to the platform.

        Args:
          socket: used by this stream only.
          encode: makes the body of a request.
          look_up: fetches a task's view over HTTP, by its id.
        """
        self._socket = socket
        self._encode = encode
        self._look_up = look_up
        self._references = count()
        #: Requests that are sent and not accepted yet, by our reference.
        self._sent: dict[str, Request] = {}
        #: Accepted requests by task id; None for a task that was submitted before. Several requests
        #: may share a task.
        self._accepted: dict[str, list[Request | None]] = {}
        #: Ids of tasks that the platform has reported on this connection.
        self._reported: set[str] = set()

    def results(self, items: Iterable[Request | str]) -> Iterator[Result]:
        """Yield the results of requests and of submitted tasks, as they arrive.

        Args:
          items: requests, and ids of tasks.

        Raises:
          ServingError: the connection was lost.
        """
        waiting = iter(items)
        while True:
            taken = 0
            for item in islice(waiting, STREAM_WINDOW - len(self._sent) - len(self._accepted)):
                taken += 1
                if isinstance(item, Request):
                    self._submit(item)
                elif item in self._reported:
                    yield self._fetch(item, None)
                else:
                    self._accepted.setdefault(item, []).append(None)
                    self._socket.send({"type": "subscribe", "task_ids": [item]})
            if self._sent or self._accepted:
                yield from self._receive()
            elif not taken:
                return

    def _submit(self, request: Request) -> None:
        reference = str(next(self._references))
        self._sent[reference] = request
        message = {"type": "submit", "id": reference, **self._encode(request)}
        if request.idempotency_key is not None:
            message["idempotency_key"] = request.idempotency_key
        self._socket.send(message)

    def _receive(self) -> Iterator[Result]:
        """Wait for one message and yield the results that it brings."""
        message = self._socket.receive()
        kind = message["type"]
        data: Any = message.get("data")
        if kind == "accepted" and message.get("id") in self._sent:
            task_id, request = data["task_id"], self._sent.pop(message["id"])
            if task_id in self._reported:
                yield self._fetch(task_id, request)
            else:
                self._accepted.setdefault(task_id, []).append(request)
        elif kind in ("result", "error") and message.get("task_id") in self._accepted:
            task_id = message["task_id"]
            self._reported.add(task_id)
            for sharer in self._accepted.pop(task_id):
                # A task's view has its state as a string, a problem object the HTTP status: the
                # task is unknown, or its result is gone.
                if isinstance(data["status"], str):
                    yield read_result(data, sharer)
                else:
                    yield failed_result(data, task_id, sharer)
        elif kind == "error" and message.get("id") in self._sent:
            yield failed_result(data, "", self._sent.pop(message["id"]))
        elif kind == "error":
            raise rebuild(data)

    def _fetch(self, task_id: str, request: Request | None) -> Result:
        """Return the result of a task that was reported on this connection before."""
        try:
            return read_result(self._look_up(task_id), request)
        except InfernoError as exc:
            return failed_result(exc.problem(), task_id, request)
