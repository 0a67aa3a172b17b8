"""One keep-alive connection to the front end, for one thread."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Any

import msgspec

#: What is raised when a connection is cut, or falls silent.
CUT = (OSError, http.client.HTTPException)


class Connection:
    """Calls with JSON. httpx would take most of a core for what the load needs."""

    def __init__(self, port: int, timeout_s: float) -> None:
        """Store the port of the front end, and how long an answer may take in seconds."""
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)

    def open(self) -> None:
        """Connect, unless it is connected.

        Raises:
          OSError: nobody listens.
        """
        if self._http.sock is None:
            self._http.connect()

    def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Return the status and the document of an answer.

        Raises:
          OSError, http.client.HTTPException: there was none, or no JSON; see `CUT`.
        """
        try:
            self.open()
            content = None if body is None else msgspec.json.encode(body)
            self._http.request(method, path, content)
            answer = self._http.getresponse()
            document: dict[str, Any] = msgspec.json.decode(answer.read())
        except msgspec.DecodeError as exc:
            self.close()
            raise http.client.HTTPException(f"status {answer.status}, and no JSON") from exc
        except BaseException:
            self.close()
            raise
        if answer.will_close:
            self.close()
        return answer.status, document

    def close(self) -> None:
        """Hang up."""
        self._http.close()
