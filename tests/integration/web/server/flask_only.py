"""The web process without its short way: Flask answers everything."""

from __future__ import annotations

from web.server.worker import Worker


class FlaskOnly(Worker):
    """A worker that takes no head for a plain one."""

    def load_wsgi(self) -> None:
        """Load the app, and leave the short way out."""
        super().load_wsgi()
        self._fast.read_head = lambda text: None  # type: ignore[method-assign]
