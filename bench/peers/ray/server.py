"""Ray Serve: one replica behind its HTTP proxy, on a cluster that this process starts."""

from __future__ import annotations

import signal
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from bench.peers.forward import MAX_BATCH_DELAY_MS, MAX_BATCH_SIZE, PORT, answer_members, load


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Model:
    """The workload."""

    def __init__(self) -> None:
        """Load it."""
        self._forward = load()

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=MAX_BATCH_DELAY_MS / 1000)
    async def predict(self, members: list[list[str]]) -> list[dict[str, Any]]:
        """Answer one batch."""
        return answer_members(self._forward, members)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        body = await request.json()
        answer: dict[str, Any] = await self.predict(body["texts"])
        return answer


def main() -> None:
    """Serve until SIGTERM, then stop the cluster."""
    signals = {signal.SIGTERM, signal.SIGINT}
    ray.init(include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    application = Model.bind()  # type: ignore[attr-defined]
    serve.run(application, route_prefix="/predict")
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.sigwait(signals)
    ray.shutdown()


if __name__ == "__main__":
    main()
