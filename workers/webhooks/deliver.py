"""Deliver step of webhooks: post events of tasks to the URLs that clients have named.

A webhook is the Celery task `webhooks.deliver` on a queue of its own, so that a slow or absent
receiver delays only webhooks. The task's state is looked up when the webhook is delivered. It runs
in a thread of the pool of a worker that has no models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import msgspec
from celery import Task
from celery.exceptions import Ignore, Reject

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

    def _call(self, address: Address, webhook: Webhook) -> int:
        """Call a receiver if it has a place, and return the status of its answer."""
        receiver = f"{address.host}:{address.port}"
        place = self._places.take(receiver)
        if place is None:
            self._come_back(webhook, self._places.wait_s(receiver))
        # Without a place, the task is not looked up: its result may be large.
        with place:
            return self._outbound.post(address, *self._request(webhook))

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Publish the next attempt; requeue this message if the broker does not accept it.

        Celery would drop the webhook.
        """
        try:
            return super().retry(*args, **kwargs)
        except Reject as exc:
            raise Reject(exc.reason, requeue=True) from exc

    def _come_back(self, webhook: Webhook, wait_s: float) -> NoReturn:
        """Publish the message again, for later; this was no attempt."""
        eta = datetime.now(UTC) + timedelta(seconds=wait_s)
        try:
            self._lanes.send(later(webhook, self.request.id, self.request.retries, eta))
        except BrokerUnavailable as exc:
            raise Reject(exc, requeue=True) from exc
        raise Ignore

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
