"""Celery's request for an ordinary message of a lane, without what Celery does for the others.

celery.worker reads protocols of both versions, times of several notations and bodies of any type,
and makes promises to acknowledge each message by itself. That takes longer than all the rest of a
short task. Here is read what `tasks.intake.submit` and `send_task` write; whatever else comes is
left to Celery, so that it means the same in every worker.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery.worker.consumer import Consumer
from celery.worker.request import Request
from celery_batches import Batches

from tasks.transport import Message

#: Headers with which a message is not ordinary, if they say anything.
_PARTICULAR = ("compression", "eta", "shadow")


class Delivery(Request):  # type: ignore[misc]
    """One message in a worker's hands, as Celery's remote control and events know it."""

    def __init__(
        self, message: Message, payload: Any, expires: datetime | None, task: Batches, c: Consumer
    ) -> None:
        """Set what Celery's own constructor sets; use `read`.

        Args:
          message: as it came.
          payload: what its body says.
          expires: when it does.
          task: that it asks for.
          c: the worker's consumer.
        """
        headers, properties, info = message.headers, message.properties, message.delivery_info
        self._message = message
        self._app = c.app
        self._task = task
        self._hostname = c.hostname
        self._eventer = c.event_dispatcher
        self._connection_errors = c.connection_errors
        self._body = message.body
        self._content_type = message.content_type
        self._content_encoding = message.content_encoding
        self._utc = True
        self._decoded = False
        # The name that Python gives to the private attribute of that class.
        self._Request__payload = payload
        self._args, self._kwargs, _ = payload
        self.id = headers["id"]
        self._type = self.name = headers["task"]
        self._root_id = headers.get("root_id")
        self._parent_id = headers.get("parent_id")
        self._argsrepr = headers.get("argsrepr", "")
        self._kwargsrepr = headers.get("kwargsrepr", "")
        self._ignore_result = task.ignore_result
        self._on_ack = message.ack_log_error
        self._on_reject = message.reject_log_error
        self._eta = None
        self._expires = expires
        self._delivery_info = {
            "exchange": info.get("exchange"),
            "routing_key": info.get("routing_key"),
            "priority": properties.get("priority"),
            "redelivered": info.get("redelivered", False),
        }
        self._request_dict = headers

    @classmethod
    def read(cls, message: Message, task: Batches, c: Consumer) -> Delivery | None:
        """Return the request of a message, or None when Celery shall make one.

        Args:
          message: out of a stream.
          task: of the lane.
          c: the worker's consumer.
        """
        headers = message.headers
        try:
            ours = headers["task"] == task.name and message.content_type == "application/json"
            if not ours or message.errors or any(map(headers.get, _PARTICULAR)):
                return None
            expires = headers.get("expires")
            if expires is not None:
                expires = datetime.fromisoformat(expires)
                if expires.tzinfo is None:
                    return None
            return cls(message, message.payload, expires, task, c)
        except Exception:
            return None
