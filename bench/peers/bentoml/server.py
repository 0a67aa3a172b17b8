"""BentoML: one worker process; the first dimension of a batchable API is the batch."""

from __future__ import annotations

from typing import Any

import bentoml

from bench.peers.forward import MAX_BATCH_SIZE, load


@bentoml.service(workers=1, traffic={"timeout": 60})
class Model:
    """The workload."""

    def __init__(self) -> None:
        """Load it."""
        self._forward = load()

    # BentoML finds the window itself. `max_latency_ms` is when it rejects requests with a 503; with
    # the 10 ms of the others it would reject nearly all of them.
    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=10_000)
    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        """Answer one batch."""
        outputs = self._forward(texts)
        return [{"output": output, "batch_size": len(texts)} for output in outputs]
