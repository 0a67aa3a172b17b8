"""The reports that workers leave in Redis: which versions each one serves, and how fast."""

from __future__ import annotations

import logging
import time
from threading import Lock

import msgspec
import redis

from inferno import names
from inferno.batching.pace import Speed
from inferno.errors import BrokerUnavailable
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.transport.script import Script


class HeldVersion(
    msgspec.Struct, frozen=True, omit_defaults=True, rename={"load_generation": "asked"}
):
    """A worker's report of one version of a model."""

    #: `loading`, `ready` or `failed`.
    state: str
    #: `Package.digest` of the files that it has loaded.
    digest: str = ""
    #: Entry of `Deployment.load_generations` when it was loaded, or failed.
    load_generation: int = 0
    #: Why loading failed; if the version is ready, why loading it again failed.
    error: str | None = None
    #: Duration of loading and warming up, in seconds.
    load_s: float = 0.0
    #: Memory of its device that it occupies, as far as it can be measured.
    memory_bytes: int = 0


class WorkerReport(msgspec.Struct, frozen=True):
    """The last report of one worker process."""

    #: Celery's node name.
    worker: str
    #: Versions that are loaded and warm, by model, for the models whose tasks it takes.
    models: dict[str, list[int]]
    #: `starting`, `ready` or `draining`.
    state: str
    device: str
    pid: int
    #: Seconds since the epoch.
    reported_at: float
    #: Speed by model; a model that has answered nothing yet is missing.
    speeds: dict[str, Speed] = {}
    #: `Package.digest` of each loaded version, by `<model>/<version>`.
    packages: dict[str, str] = {}
    #: `names.worker_label`, by which callers know it; empty in reports of older workers.
    label: str = ""
    #: The versions that it has loaded, is loading or could not load, by model.
    held: dict[str, dict[int, HeldVersion]] = {}


logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(WorkerReport).decode


def _report(value: bytes | str) -> WorkerReport | None:
    """Return a report, or None for what no worker has written; workers remove that."""
    try:
        return _decode(value)
    except msgspec.DecodeError as exc:
        logger.error("a worker's report cannot be read: %s", exc)
        return None


class Cluster:
    """Reads and writes the workers' reports."""

    #: How long a process uses the reports that it read last, in seconds.
    CACHE_S = 1.0

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where reports are."""
        self._redis = client
        self._key = names.workers_key(settings.redis.prefix)
        self._packages_key = names.packages_key(settings.redis.prefix)
        self._write = Script("tasks.state", "report")
        self._ttl = settings.worker.heartbeat_ttl_s
        self._reading = Lock()
        #: Start of the last read; monotonic seconds.
        self._read_at = 0.0
        self._failure: BrokerUnavailable | None = None
        self._failed_at = 0.0
        self._workers: list[WorkerReport] = []
        #: Time of the last report of any ready worker, by model.
        self._ready: dict[str, float] = {}

    def workers(self, max_age_s: float = CACHE_S) -> list[WorkerReport]:
        """Return the reports of the workers that are alive.

        Args:
          max_age_s: read the reports again if the last read is older than this. 0 always reads;
            callers at the same time share one read.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        self._read(max_age_s)
        oldest = time.time() - self._ttl
        return [report for report in self._workers if report.reported_at >= oldest]

    def serves(self, model: str, max_age_s: float = CACHE_S) -> bool:
        """Return whether a ready worker of a model is alive.

        Args:
          model: its name.
          max_age_s: as in `workers`.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        self._read(max_age_s)
        return self._ready.get(model, 0.0) >= time.time() - self._ttl

    def _read(self, max_age_s: float) -> None:
        asked_at = time.monotonic()
        if asked_at - self._read_at < max_age_s:
            return
        # Threads that ask while one of them reads share its reports, or its failure.
        with self._reading:
            if self._failure is not None and self._failed_at > asked_at:
                raise self._failure
            began_at = time.monotonic()
            if self._read_at >= asked_at or began_at - self._read_at < max_age_s:
                return
            try:
                with translated():
                    reports = [*filter(None, map(_report, self._redis.hvals(self._key)))]
            except BrokerUnavailable as exc:
                self._failure, self._failed_at = exc, time.monotonic()
                raise
            self._workers = sorted(reports, key=lambda report: report.worker)
            self._ready = {
                model: report.reported_at
                for report in sorted(reports, key=lambda report: report.reported_at)
                if report.state == "ready"
                for model in report.models
            }
            self._read_at = began_at

    def serving(self, model: str, max_age_s: float = CACHE_S) -> list[WorkerReport]:
        """Return the reports of the ready workers of a model, including those that cannot load it.

        Args:
          model: its name.
          max_age_s: as in `workers`.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        return [
            report
            for report in self.workers(max_age_s)
            if report.state == "ready" and (model in report.models or model in report.held)
        ]

    def speed(self, model: str) -> Speed | None:
        """Return the total speed of the ready workers of a model; None unless all have one.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        total = None
        for report in self.workers():
            if report.state == "ready" and model in report.models:
                speed = report.speeds.get(model)
                if speed is None:
                    return None
                total = speed if total is None else total + speed
        return total

    def report(self, report: WorkerReport) -> None:
        """Write a report, and remove the reports of workers that are long gone."""
        oldest = time.time() - 10 * self._ttl
        gone = [
            name
            for name, value in self._redis.hgetall(self._key).items()
            if (found := _report(value)) is None or found.reported_at < oldest
        ]
        self._write.run(
            self._redis,
            {
                "workers": self._key,
                "packages": self._packages_key,
                "worker": report.worker,
                "report": _encode(report),
                "gone": gone,
                "digests": [part for item in report.packages.items() for part in item],
            },
        )

    def leave(self, worker: str) -> None:
        """Remove the report of a worker that stops."""
        self._redis.hdel(self._key, worker)
