"""Deliver step of webhooks: post events of tasks to the URLs that clients have named.

A webhook is the Celery task `webhooks.deliver` on a queue of its own, so that a slow or absent
receiver delays only webhooks. The task's state is looked up when the webhook is delivered. It runs
in a thread of the pool of a worker that has no models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from celery import Celery, Task
from celery.exceptions import Ignore, Reject
from celery.worker.consumer import Consumer
from celery.worker.strategy import default as default_strategy

from inferno import names
from inferno.errors import BrokerUnavailable, InvalidField, ResultExpired, TaskNotFound
from inferno.protocol.webhooks import EVENTS, Address, parse_address, sign
from inferno.settings import WebhookSettings
from tasks.broker.lanes import Lanes
from tasks.broker.webhook_message import Webhook, later, message_id, read
from tasks.results import views as documents
from tasks.state.outcomes import Outcome
from tasks.state.records import Record, Records
from workers.webhooks.outbound import NotAllowed, NotReached, Outbound
from workers.webhooks.places import Places

logger = logging.getLogger(__name__)


class DeliveryFailed(Exception):
    """The receiver did not accept the webhook; a later attempt may succeed."""


class DeliveryRefused(Exception):
    """The webhook can never be delivered: the receiver is gone, or must not be called."""


class Deliver(Task):  # type: ignore[misc]
    """The Celery task that delivers one webhook, and retries with exponential backoff."""

    name = names.WEBHOOK_TASK
    acks_late = True
    ignore_result = True
    autoretry_for = (DeliveryFailed,)
    retry_jitter = True
    #: Celery logs these without a traceback.
    throws = (DeliveryFailed, DeliveryRefused)

    def __init__(
        self,
        records: Records,
        lanes: Lanes,
        outbound: Outbound,
        places: Places,
        settings: WebhookSettings,
    ) -> None:
        """Store what deliveries need.

        Args:
          records: look up the state of tasks.
          lanes: publish what is to be delivered later.
          outbound: makes the requests.
          places: share the threads among receivers.
          settings: the secret, and the retry policy.
        """
        self._records = records
        self._lanes = lanes
        self._outbound = outbound
        self._places = places
        self._key = settings.key
        self.max_retries = settings.max_retries
        self.retry_backoff = settings.backoff_s
        self.retry_backoff_max = settings.max_backoff_s

    def run(self, **kwargs: Any) -> None:
        """Deliver a webhook once; see `tasks.broker.webhook_message.message` for the arguments.

        Raises:
          DeliveryFailed: Celery retries.
          DeliveryRefused: Celery does not retry.
          Ignore: the receiver occupies all its threads; a copy of the message comes later.
        """
        try:
            webhook = read(kwargs)
        except InvalidField as exc:
            raise DeliveryRefused(str(exc)) from exc
        try:
            address = parse_address(webhook.url)
            status = self._call(address, webhook)
        except (InvalidField, NotAllowed) as exc:
            raise DeliveryRefused(f"{webhook.id}: {exc}") from exc
        except (NotReached, BrokerUnavailable) as exc:
            raise DeliveryFailed(f"{webhook.id}: {exc}") from exc
        if status == 410:
            raise DeliveryRefused(f"{webhook.id}: {address} answered 410 Gone")
        if not 200 <= status < 300:
            raise DeliveryFailed(f"{webhook.id}: {address} answered {status}")

    def Strategy(self, task: Task, app: Celery, consumer: Consumer) -> Callable[..., None]:
        """Return the handler of messages, which runs on the event loop.

        It puts off what has no place at once: that takes a fifth of the time of a task of Celery.
        """
        handle = default_strategy(task, app, consumer)

        def receive(message: Any, body: Any, ack: Any, *rest: Any, **options: Any) -> None:
            # Only messages of Celery's old protocol have a body here.
            if body is None and self._has_put_off(message):
                ack(logger, consumer.connection_errors)
            else:
                handle(message, body, ack, *rest, **options)

        return receive

    def _has_put_off(self, message: Any) -> bool:
        """Publish a message again if its receiver has no place; returns whether it did so."""
        try:
            webhook = read(message.payload[1])
            receiver = _receiver(parse_address(webhook.url))
            if self._places.has_one(receiver):
                return False
            retries = int(message.headers.get("retries") or 0)
            self._put_off(webhook, receiver, message.headers["id"], retries)
        except Exception:
            # Whatever is wrong with the message or the broker, the task says it.
            return False
        return True

    def _call(self, address: Address, webhook: Webhook) -> int:
        """Call a receiver if it has a place, and return the status of its answer."""
        receiver = _receiver(address)
        place = self._places.take(receiver)
        if place is None:
            try:
                self._put_off(webhook, receiver, self.request.id, self.request.retries)
            except BrokerUnavailable as exc:
                raise Reject(exc, requeue=True) from exc
            raise Ignore
        # Without a place, the task is not looked up: its result may be large.
        with place:
            return self._outbound.post(address, *self._request(webhook))

    def _put_off(self, webhook: Webhook, receiver: str, delivery_id: str, retries: int) -> None:
        """Publish a message again, for the time when its receiver may have a place."""
        eta = datetime.now(UTC) + timedelta(seconds=self._places.wait_s(receiver))
        self._lanes.send(later(webhook, delivery_id, retries, eta))

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Publish the next attempt; requeue this message if the broker does not accept it.

        Celery would drop the webhook.
        """
        try:
            return super().retry(*args, **kwargs)
        except Reject as exc:
            raise Reject(exc.reason, requeue=True) from exc

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Publish, and hide the URL from Flower: it may contain a token."""
        shown = message_id(kwargs["task_id"], kwargs["event"]) if kwargs else ""
        return super().apply_async(args, kwargs, **{"kwargsrepr": shown, **options})

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Log that a webhook was given up."""
        logger.warning("webhook given up after try %d: %s", self.request.retries + 1, exc)

    def _request(self, webhook: Webhook) -> tuple[dict[str, str], bytes]:
        """Return the headers and the body of a call."""
        record, outcome = self._records.fetch(webhook.task_id)
        occurred_at = webhook.occurred_at
        if occurred_at is None:
            occurred_at = _ended_at(record)
        body = msgspec.json.encode(
            {
                "type": EVENTS[webhook.event],
                "timestamp": documents.time(occurred_at),
                "data": _document(webhook, record, outcome),
            }
        )
        return self._headers(webhook.id, body), body

    def _headers(self, webhook_id: str, body: bytes) -> dict[str, str]:
        # Each attempt is signed anew, because receivers refuse old timestamps as replays.
        timestamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "Inferno",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
        }
        if self._key is not None:
            headers["webhook-signature"] = sign(self._key, webhook_id, timestamp, body)
        return headers


def _receiver(address: Address) -> str:
    """Return the name under which a receiver has its places."""
    return f"{address.host}:{address.port}"


def _ended_at(record: Record | None) -> float:
    """Return when a task ended, in seconds since the epoch; now when its record is gone."""
    return time.time() if record is None or record.finished_at is None else record.finished_at


def _document(
    webhook: Webhook, record: Record | None, outcome: Outcome | None
) -> Mapping[str, Any]:
    """Return what `GET /tasks/<task_id>` answers, or as much of it as is still known."""
    try:
        return documents.task(webhook.task_id, record, outcome)
    except (TaskNotFound, ResultExpired):
        known = {"task_id": webhook.task_id, "model": webhook.model, "version": webhook.version}
        status = {} if record is None else {"status": record.state}
        return known | status | {"links": documents.links(webhook.task_id)}
