"""The Celery app. Importing it loads no model and no worker code."""

from __future__ import annotations

from typing import Any

from celery import Celery

from inferno import names

app = Celery("inferno")
app.config_from_object("celeryconfig")


def route(name: str, *_: Any, **__: Any) -> dict[str, str] | None:
    """Send the task `infer.<model>` to the model's lane (a Celery router)."""
    lane = names.lane(name)
    return None if lane is None else {"queue": lane}
