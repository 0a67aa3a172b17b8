"""Messages of webhooks, which any program may publish."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest

from inferno.errors import InvalidField
from tasks.broker.webhook_message import Webhook, later, message, read

WEBHOOK = Webhook("https://a.example/?key=TOKEN", "task-1", "start", "m", 1, 1.5)


def test_a_webhook_is_read_as_it_was_published() -> None:
    sent = message(WEBHOOK.url, "task-1", "start", "m", 1, 1.5)

    assert read(sent.kwargs) == WEBHOOK
    assert WEBHOOK.id == sent.kwargsrepr == "task-1.start"


def test_a_later_delivery_is_the_same_task_of_celery() -> None:
    eta = datetime(2026, 5, 4, tzinfo=UTC)

    sent = later(WEBHOOK, "delivery-1", 3, eta)

    assert read(sent.kwargs) == WEBHOOK
    assert (sent.task_id, sent.retries, sent.eta) == ("delivery-1", 3, eta)
    assert "TOKEN" not in sent.kwargsrepr


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task_id", "1\r\nx-forged: yes"),
        ("task_id", "1\n"),
        ("task_id", "1 2"),
        ("task_id", "\u00e9"),
        ("task_id", ""),
        ("task_id", "x" * 256),
        ("event", "end"),
        ("event", "start\n"),
        ("occurred_at", math.inf),
        ("occurred_at", math.nan),
        ("occurred_at", -1),
        ("model", None),
        ("url", 1),
        ("version", "1"),
    ],
)
def test_a_wrong_message_is_refused_without_repeating_it(field: str, value: Any) -> None:
    kwargs = message(WEBHOOK.url, "task-1", "start", "m", 1, 1.5).kwargs

    with pytest.raises(InvalidField, match=rf"cannot be read: .*at `\$\.{field}`") as raised:
        read(kwargs | {field: value})

    assert "TOKEN" not in raised.value.detail
    assert "forged" not in raised.value.detail
