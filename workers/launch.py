"""How a Celery worker becomes one of ours. Celery imports this module in workers alone (`imports` in celeryconfig.py).

    celeryd_init    read the packages of the lanes given by -Q, register their tasks, set concurrency and prefetch
    Serving         a bootstep before the consumer: load and warm up, report, drain
"""

from __future__ import annotations

import math
import sys
from typing import Any

from celery import bootsteps, signals
from celery.apps.worker import Worker

from inferno.engine import choose_device
from inferno.errors import ConfigurationError, InfernoError
from inferno.settings import Settings, load
from tasks.celery import app
from tasks.connection import connect
from tasks.records import Records
from tasks.settle import Settler
from workers.heartbeat import Heartbeat
from workers.hosting import HostedModel, host


class Host:
    """What this worker process serves; made when Celery has parsed its command line."""

    def __init__(self, lanes: list[str], settings: Settings) -> None:
        """Read the packages and register the lanes' tasks.

        Raises:
          ConfigurationError: a lane has no model, or its package is broken.
        """
        self.settings = settings
        self.settler = Settler(app, Records(connect(settings), settings))
        self.models: list[HostedModel] = host(app, lanes, self.settler, settings)
        self.device = choose_device(settings.inference.device)
        self.heartbeat: Heartbeat | None = None

    @property
    def executors(self) -> int:
        """Forward passes at the same time, over all lanes."""
        return sum(model.executors for model in self.models)

    @property
    def prefetch_multiplier(self) -> int:
        """Celery's prefetch for each thread of the pool."""
        return math.ceil(sum(model.prefetch for model in self.models) / self.executors)


_host: Host | None = None


@signals.celeryd_init.connect
def configure(conf: Any, options: dict[str, Any], **_: Any) -> None:
    """Read the packages and fit Celery's settings to them.

    Celery swallows exceptions of signal handlers, so that errors end the process here.
    """
    global _host
    try:
        _check(conf, options)
        lanes = options.get("queues") or []
        _host = Host(lanes.split(",") if isinstance(lanes, str) else list(lanes), load())
        conf.worker_concurrency = _host.executors
        conf.worker_prefetch_multiplier = _host.prefetch_multiplier
    except InfernoError as exc:
        sys.exit(f"Error: {exc}")


def _check(conf: Any, options: dict[str, Any]) -> None:
    if not options.get("queues"):
        raise ConfigurationError("name the model to serve: celery -A tasks worker -Q <model>")
    if conf.worker_disable_prefetch or options.get("disable_prefetch"):
        raise ConfigurationError("--disable-prefetch would leave one task to a batch; leave it out")
    if options.get("concurrency") or options.get("autoscale"):
        raise ConfigurationError(
            "concurrency follows from concurrency.max_concurrency in model.yaml; leave -c and --autoscale out"
        )


class Serving(bootsteps.StartStopStep):  # type: ignore[misc]
    """Loads the engines before the consumer takes tasks, and drains after it has stopped."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Worker, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        pool = worker.pool_cls.__module__
        if not pool.endswith(".thread"):
            sys.exit(f"Error: engines need the threads pool; leave -P out (it was {pool.rpartition('.')[2]})")

    def start(self, worker: Worker) -> None:
        """Load and warm up, then say so."""
        assert _host is not None
        _host.heartbeat = Heartbeat(worker.hostname, _host.models, _host.device, _host.settings)
        _host.heartbeat.start()
        try:
            for model in _host.models:
                model.preload()
        except InfernoError as exc:
            _host.heartbeat.stop()
            sys.exit(f"Error: {exc}")
        _host.heartbeat.change("ready")

    def close(self, worker: Worker) -> None:
        """Say that no more tasks are taken."""
        if _host is not None and _host.heartbeat is not None:
            _host.heartbeat.change("draining")

    def stop(self, worker: Worker) -> None:
        """Sign off; running batches end with the pool."""
        if _host is not None and _host.heartbeat is not None:
            _host.heartbeat.stop()

    def terminate(self, worker: Worker) -> None:
        """Stop waiting for a Redis that is away."""
        if _host is not None:
            _host.settler.stop()
        self.stop(worker)


app.steps["worker"].add(Serving)
