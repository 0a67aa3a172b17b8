"""Celery with celery-batches, as in their tutorials."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import worker_process_init
from celery_batches import Batches, SimpleRequest

from bench.peers.forward import (
    MAX_BATCH_DELAY_MS,
    MAX_BATCH_SIZE,
    Forward,
    answer_members,
    load,
)

app = Celery("worker", broker=os.environ["BENCH_REDIS"], backend=os.environ["BENCH_REDIS"])
# celery-batches needs at least one batch; here, one that runs and one that fills.
app.conf.worker_prefetch_multiplier = 2 * MAX_BATCH_SIZE

_forward: Forward | None = None


@worker_process_init.connect
def load_model(**_: Any) -> None:
    """Load in the pool's process, because a session's threads do not survive a fork."""
    global _forward
    _forward = load()


@app.task(
    base=Batches,
    flush_every=MAX_BATCH_SIZE,
    flush_interval=MAX_BATCH_DELAY_MS / 1000,
    name="predict",
)
def predict(requests: list[SimpleRequest]) -> None:
    """Answer one batch."""
    assert _forward is not None
    answers = answer_members(_forward, [request.args[0] for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        app.backend.mark_as_done(request.id, answer, request=request)
