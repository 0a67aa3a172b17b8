"""Batch step: a fast Celery request for ordinary messages of a lane, on the worker's event loop.

Celery's own way reads two protocol versions, several time formats and bodies of any type, and
creates promises to acknowledge each message. That takes longer than all the rest of a short task.
This module reads what `tasks.intake.submit` and `send_task` write. All other messages are left to
Celery, so that they mean the same as in every worker.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery.worker.consumer import Consumer
from celery.worker.request import Request
from celery_batches import Batches

from tasks.transport import Message

#: Headers that make a message special unless they are empty.
_SPECIAL = ("compression", "eta", "shadow")


class Delivery(Request):  # type: ignore[misc]
    """One message in a worker's hands, as Celery's remote control and events expect it."""

    def __init__(
        self, message: Message, payload: Any, expires: datetime | None, task: Batches, c: Consumer
    ) -> None:
        """Set what Celery's own constructor sets; call `read` instead.

        Args:
          message: the message from the broker.
          payload: its decoded body.
          expires: when the task expires, or None.
          task: the task that it is for.
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
        # Python's name for the private attribute `__payload` of Celery's class.
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
        """Return the request of a message, or None if it is left to Celery.

        Args:
          message: a message from a stream.
          task: the task of the lane.
          c: the worker's consumer.
        """
        headers = message.headers
        try:
            ours = headers["task"] == task.name and message.content_type == "application/json"
            if not ours or message.errors or any(map(headers.get, _SPECIAL)):
                return None
            expires = headers.get("expires")
            if expires is not None:
                expires = datetime.fromisoformat(expires)
                if expires.tzinfo is None:
                    return None
            return cls(message, message.payload, expires, task, c)
        except Exception:
            return None
