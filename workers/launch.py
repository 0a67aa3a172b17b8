"""Turns a Celery worker into a worker of models, or of webhooks.

    worker_init   read the packages of the lanes given by -Q, register their tasks, and set
                  concurrency and prefetch
    Serving       a bootstep before the consumer: load and warm up, report, drain

A worker of the queue `webhooks` has no models: it is an ordinary Celery worker with one task.

Celery imports this module only in workers: see `imports` in celeryconfig.py.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
from typing import Any

import redis
from celery import bootsteps, signals
from celery.apps.worker import Worker

from inferno import log_records, names
from inferno.engine.cores import Cores
from inferno.engine.device import choose_device
from inferno.errors import BrokerUnavailable, ConfigurationError, InfernoError
from inferno.settings import Settings, load, variable
from tasks.broker.connection import connect
from tasks.broker.lanes import Lanes
from tasks.celery import app
from tasks.state.records import Records
from tasks.state.transitions import Transitions
from workers.batches.settle import Settler
from workers.heartbeat import Heartbeat
from workers.hosting.model import HostedModel
from workers.hosting.reconcile import Reconciler
from workers.hosting.watchdog import Watchdog
from workers.hosting.wiring import host
from workers.webhooks.deliver import Deliver
from workers.webhooks.outbound import Outbound
from workers.webhooks.places import Places

logger = logging.getLogger(__name__)

# Before the worker logs anything.
log_records.install()


class Host:
    """What this worker process serves; built when Celery has parsed its command line."""

    def __init__(self, queues: list[str], settings: Settings, cores: Cores) -> None:
        """Read the packages and register the lanes' tasks.

        Args:
          queues: the lanes.
          settings: all settings.
          cores: cores that forward passes run on.
        Raises:
          ConfigurationError: a lane has no model, or its package is broken.
        """
        self.settings = settings
        client = connect(settings)
        self.lanes = Lanes(app, client, settings)
        self.settler = Settler(self.lanes, Transitions(client, settings), settings)
        self.watchdog = Watchdog()
        self.models: list[HostedModel] = host(
            app, queues, self.settler, self.lanes, settings, self.watchdog, cores
        )
        self.device = choose_device(settings.inference.device)
        self.heartbeat: Heartbeat | None = None
        self.reconciler: Reconciler | None = None

    @property
    def threads(self) -> int:
        """Number of batches in progress at once, over all lanes."""
        return sum(model.threads for model in self.models)

    @property
    def prefetch_multiplier(self) -> int:
        """Celery's prefetch per thread of the pool."""
        return math.ceil(sum(model.prefetch for model in self.models) / self.threads)


_host: Host | None = None


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def configure(sender: Worker, **_: Any) -> None:
    """Read the packages of the worker's lanes, and fit concurrency and prefetch to them.

    Errors end the process here, because Celery swallows exceptions of signal handlers.
    """
    global _host
    queues = list(app.amqp.queues.consume_from)
    _forget_built_in_tasks()
    try:
        settings = load()
        if settings.redis.risk is not None:
            logger.warning(settings.redis.risk)
        _check_password(settings)
        # Before any thread starts: threads inherit the cores.
        cores = Cores(settings.inference.cores)
        cores.leave()
        if names.WEBHOOK_QUEUE in queues:
            _deliver_webhooks(sender, queues, settings)
            return
        _check(sender)
        _host = Host(queues, settings, cores)
    except InfernoError as exc:
        sys.exit(f"Error: {exc}")
    # Celery's defaults, one thread per core and 4 tasks per thread, do not suit batches.
    sender.concurrency = _host.threads
    sender.prefetch_multiplier = _host.prefetch_multiplier


def _forget_built_in_tasks() -> None:
    """Remove Celery's own tasks, such as `celery.chord_unlock`, which repeats itself for ever.

    The platform has no use for them, and a message could ask for them.
    """
    for name in [name for name in app.tasks if name.startswith("celery.")]:
        app.tasks.unregister(name)


def _deliver_webhooks(worker: Worker, queues: list[str], settings: Settings) -> None:
    if len(queues) > 1:
        raise ConfigurationError(
            f"the queue {names.WEBHOOK_QUEUE} needs a worker of its own, without -Q of a model; "
            f"start it with: celery -A tasks worker -Q {names.WEBHOOK_QUEUE}"
        )
    limits = settings.webhooks
    outbound = Outbound(limits.timeout_s, allow_private=limits.allow_private)
    places = Places(worker.concurrency, limits.per_host, limits.max_backoff_s)
    client = connect(settings)
    lanes, records = Lanes(app, client, settings), Records(client, settings)
    app.register_task(Deliver(records, lanes, outbound, places, limits))
    # A thread that waits for a slow receiver must not hold webhooks that another could deliver.
    worker.prefetch_multiplier = 1


def _check_password(settings: Settings) -> None:
    """Check that Redis takes the password of this worker; a Redis that is away is waited for later.

    Raises:
      ConfigurationError: the password is missing or wrong.
    """
    try:
        with connect(settings) as client:
            client.ping()
    except redis.AuthenticationError as exc:
        reason = str(exc).rstrip(".")
        raise ConfigurationError(
            f"Redis refuses this worker: {reason}; set the password in {variable('redis', 'url')}"
        ) from None
    except redis.RedisError:
        return


def _check(worker: Worker) -> None:
    if worker.app.conf.worker_disable_prefetch:
        raise ConfigurationError("--disable-prefetch leaves one task to a batch; leave it out")
    if worker.options.get("autoscale"):
        raise ConfigurationError("--autoscale cannot scale engines; start more workers instead")
    pool = worker.pool_cls if isinstance(worker.pool_cls, str) else worker.pool_cls.__module__
    if "thread" not in pool:
        raise ConfigurationError(f"engines need the pool `threads`, not {pool}; leave -P out")


class Serving(bootsteps.StartStopStep):  # type: ignore[misc]
    """Loads the engines before the consumer takes tasks, and drains after it has stopped."""

    requires = ("celery.worker.components:Pool",)

    def include_if(self, worker: Worker) -> bool:
        """Return whether this worker has models to load."""
        return _host is not None

    def start(self, worker: Worker) -> None:
        """Load and warm up all models, then report them as ready."""
        assert _host is not None
        _host.heartbeat = Heartbeat(worker.hostname, _host.models, _host.device, _host.settings)
        _host.heartbeat.start()
        logger.info("answers and errors call this worker %s", names.worker_label())
        _host.reconciler = Reconciler(_host.models, _host.settings, lambda: self._changed(worker))
        _host.reconciler.reconcile()
        for model in _host.models:
            if not model.takes_tasks:
                logger.error("%s is not served until it can be loaded", model.name)
                app.amqp.queues.deselect(model.name)
        _host.watchdog.start()
        # All objects so far live until the end. Without this, each full garbage collection looks
        # through them, and stops every thread for 50 ms.
        gc.collect()
        gc.freeze()
        _host.heartbeat.change("ready")
        # The desired state may have changed while this worker was not listed as ready.
        _host.reconciler.reconcile()
        _host.reconciler.start()

    def _changed(self, worker: Worker) -> None:
        """Report loaded and unloaded versions, and take tasks of models that are servable now."""
        assert _host is not None
        assert _host.heartbeat is not None
        _host.heartbeat.report()
        queues = app.amqp.queues
        for model in _host.models:
            if model.takes_tasks and model.name not in queues.consume_from:
                queues.select([*queues.consume_from, model.name])
                worker.consumer.call_soon(worker.consumer.add_task_queue, model.name)

    def close(self, worker: Worker) -> None:
        """Give back waiting tasks, and wait no longer for an unavailable Redis."""
        assert _host is not None
        if _host.reconciler is not None:
            _host.reconciler.stop()
        _host.settler.stop()
        for model in _host.models:
            try:
                app.tasks[names.task_name(model.model.name)].give_back()
            except BrokerUnavailable as exc:
                logger.warning("tasks of %s are not given back yet: %s", model.model.name, exc)
        if _host.heartbeat is not None:
            _host.heartbeat.change("draining")

    def stop(self, worker: Worker) -> None:
        """Finish running batches, give back all remaining tasks, and sign off."""
        if _host is None:
            return
        worker.pool.stop()
        for model in _host.models:
            try:
                _host.lanes.leave(model.model.name)
            except BrokerUnavailable as exc:
                logger.warning("tasks of %s are not given back: %s", model.model.name, exc)
        if _host.heartbeat is not None:
            _host.heartbeat.stop()

    terminate = stop


app.steps["worker"].add(Serving)
