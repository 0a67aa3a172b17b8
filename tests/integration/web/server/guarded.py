"""The app with a hook that refuses some calls, for gunicorn."""

from __future__ import annotations

from flask import Flask

from inferno.errors import Overloaded
from web.app import create_app
from web.security import Head

#: The user agent that is refused; plain predicts may name theirs.
REFUSED = "refused/1.0"


def refuse(head: Head) -> None:
    """Refuse one user agent."""
    if head.headers.get("user-agent") == REFUSED:
        error = Overloaded(f"{head.method} {head.path} from {head.headers['host']}")
        error.retry_after_s = 7
        raise error


def create() -> Flask:
    """Return the app."""
    return create_app(admit=refuse)
