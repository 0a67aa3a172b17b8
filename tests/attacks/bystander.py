"""A client that behaves, and measures how long it waits."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self

#: Time between two calls, in seconds.
EVERY_S = 0.1

#: It is at another address than the attacker.
ADDRESS = "127.0.0.2"

#: Longer than the front end needs to notice that a process hangs, in seconds.
TIMEOUT_S = 60.0

INPUTS: dict[str, Any] = {"echo": {"text": "bystander"}, "digits": {"pixels": [[[0.0] * 8] * 8]}}


@dataclass
class Waits:
    """What bystanders have seen."""

    calls: int = 0
    worst_s: float = 0.0
    errors: list[str] = field(default_factory=list)

    def __add__(self, other: Waits) -> Waits:
        return Waits(
            self.calls + other.calls,
            max(self.worst_s, other.worst_s),
            self.errors + other.errors,
        )


class Bystander:
    """Calls a model ten times a second, from a thread, until the end of the `with` block."""

    def __init__(self, host: str, port: int, model: str, *, keeps: bool) -> None:
        """Store what to call.

        Args:
          host: address of the front end.
          port: of the front end.
          model: which one to call.
          keeps: use one connection for all calls, instead of one for each.
        """
        self.waits = Waits()
        self._target = (host, port)
        self._path = f"/models/{model}:predict"
        self._body = json.dumps({"inputs": INPUTS[model], "cache": False})
        self._keeps = keeps
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        connection = self._connection()
        # Bystanders that connect together would all be at the same web process.
        self._done.wait(random.uniform(0, 0.5))
        while not self._done.wait(EVERY_S):
            began = time.monotonic()
            try:
                headers = {"content-type": "application/json"}
                connection.request("POST", self._path, self._body, headers)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    self.waits.errors.append(f"status {answer.status}")
            except (OSError, http.client.HTTPException) as exc:
                self.waits.errors.append(type(exc).__name__)
                connection.close()
            self.waits.calls += 1
            self.waits.worst_s = max(self.waits.worst_s, time.monotonic() - began)
            if not self._keeps:
                connection.close()
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        # It connects again by itself after a close.
        return http.client.HTTPConnection(
            *self._target, timeout=TIMEOUT_S, source_address=(ADDRESS, 0)
        )
