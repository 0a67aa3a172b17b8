"""Signatures of webhooks, verified by the library of Standard Webhooks."""

from __future__ import annotations

import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from inferno.protocol.webhooks import sign
from inferno.settings import WebhookSettings

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def headers(body: bytes, timestamp: int) -> dict[str, str]:
    key = WebhookSettings(secret=SECRET).key
    assert key is not None
    return {
        "webhook-id": "task-1.completed",
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(key, "task-1.completed", timestamp, body),
    }


@pytest.mark.parametrize("text", ["{}", '{"data": 1.5}', '{"text": "Grüße, 世界 🌍"}'])
def test_the_library_accepts_our_signatures(text: str) -> None:
    body = text.encode()

    Webhook(SECRET).verify(body, headers(body, int(time.time())))


def test_the_library_refuses_a_changed_body_an_old_time_and_another_secret() -> None:
    body, now = b'{"data": 1}', int(time.time())

    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(b'{"data": 2}', headers(body, now))
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body, headers(body, now - 3600))
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 32).verify(body, headers(body, now))
