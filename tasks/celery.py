"""The Celery app. Importing it loads no model and no worker code."""

from __future__ import annotations

from typing import Any

from celery import Celery

from inferno import names
from tasks.transport import register

register()
app = Celery("inferno")
app.config_from_object("celeryconfig")


def route(name: str, *_: Any, **__: Any) -> dict[str, str] | None:
    """Send `infer.<model>` to the model's lane, `webhooks.*` to `webhooks` (a Celery router)."""
    of_webhooks = name.startswith(names.WEBHOOK_QUEUE + ".")
    queue = names.WEBHOOK_QUEUE if of_webhooks else names.lane(name)
    return None if queue is None else {"queue": queue}
