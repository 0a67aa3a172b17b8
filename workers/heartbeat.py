"""A worker's reports about itself, which tell the web tier which models are served.

It runs in a thread of its own, because forward passes keep the others busy.
"""

from __future__ import annotations

import logging
import os
import time
from threading import Event, Thread

import redis

from inferno import names
from inferno.settings import Settings
from tasks.broker.connection import UNAVAILABLE, connect
from tasks.state.cluster import Cluster, WorkerReport
from workers.hosting.model import HostedModel

logger = logging.getLogger(__name__)


class Heartbeat:
    """A thread that reports every few seconds, even during a forward pass."""

    def __init__(
        self, worker: str, hosted: list[HostedModel], device: str, settings: Settings
    ) -> None:
        """Store what to report.

        Args:
          worker: Celery's node name.
          hosted: the models that the worker serves.
          device: device of its engines.
          settings: the interval, and the connection to Redis.
        """
        self._worker = worker
        self._hosted = hosted
        self._device = device
        self._interval = settings.worker.heartbeat_interval_s
        self._cluster = Cluster(connect(settings), settings)
        self._state = "starting"
        self._stop = Event()
        self._thread = Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread; the first report has the state `starting`."""
        self._thread.start()

    def change(self, state: str) -> None:
        """Report a new state at once."""
        self._state = state
        self.report()

    def stop(self) -> None:
        """Stop reporting and sign off."""
        self._stop.set()
        self._thread.join()
        try:
            self._cluster.leave(self._worker)
        except UNAVAILABLE:
            logger.info("could not sign off; the last report expires by itself")

    def _run(self) -> None:
        self.report()
        while not self._stop.wait(self._interval):
            self.report()

    def report(self) -> None:
        """Report the current state at once."""
        report = WorkerReport(
            worker=self._worker,
            models={hosted.name: hosted.ready for hosted in self._hosted if hosted.takes_tasks},
            state=self._state,
            device=self._device,
            pid=os.getpid(),
            reported_at=time.time(),
            speeds={h.name: speed for h in self._hosted if (speed := h.pace.speed)},
            packages={key: digest for h in self._hosted for key, digest in h.digests.items()},
            label=names.worker_label(),
            held={hosted.name: hosted.held for hosted in self._hosted},
        )
        try:
            self._cluster.report(report)
        except (*UNAVAILABLE, redis.ResponseError) as exc:
            logger.warning("heartbeat not sent: %s", exc)
