"""Mosec: one worker process that takes batches of JSON bodies."""

from __future__ import annotations

import sys
from typing import Any

from mosec import Server, Worker

from bench.peers.forward import MAX_BATCH_DELAY_MS, MAX_BATCH_SIZE, PORT, answer_members, load


class Model(Worker):
    """The workload."""

    def __init__(self) -> None:
        """Load it."""
        super().__init__()
        self._forward = load()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer one batch of bodies."""
        return answer_members(self._forward, [body["texts"] for body in data])


if __name__ == "__main__":
    sys.argv += ["--port", str(PORT), "--address", "127.0.0.1"]
    server = Server()
    server.append_worker(
        Model, num=1, max_batch_size=MAX_BATCH_SIZE, max_wait_time=MAX_BATCH_DELAY_MS
    )
    server.run()
