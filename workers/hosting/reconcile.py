"""Brings the models of a worker to their desired state, in a thread of its own.

Every few seconds, and at once when a change is announced: read the repository and the desired
state, load what is missing, unload what is idle or out of service, and report. So a worker that is
new, or was away, ends up with the same versions as all others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event, Thread

import redis
from msgspec.structs import replace
from redis.client import PubSub

from inferno.errors import BrokerUnavailable, InfernoError, PackageError
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import Settings
from tasks.broker.connection import UNAVAILABLE, connect
from tasks.state.cluster import Cluster
from tasks.state.deployments import Deployment, Deployments, Desired
from workers.hosting.loading import NoRoom
from workers.hosting.model import HostedModel

logger = logging.getLogger(__name__)

#: How long a version out of service must be unused before it is unloaded, in seconds. Tasks that
#: were accepted earlier may still be on their way.
DRAIN_S = 0.5


class Reconciler:
    """A thread that keeps a worker's models in their desired state."""

    def __init__(
        self, hosted: list[HostedModel], settings: Settings, changed: Callable[[], None]
    ) -> None:
        """Store the models.

        Args:
          hosted: the models of this worker.
          settings: the repository and Redis.
          changed: called when versions were loaded or unloaded, or failed to load.
        """
        self._hosted = hosted
        self._settings = settings.repository
        self._client = connect(settings)
        self._deployments = Deployments(self._client, settings)
        self._cluster = Cluster(self._client, settings)
        self._changed = changed
        self._repository: Repository | None = None
        self._stop = Event()
        self._thread = Thread(target=self._run, name="reconcile", daemon=True)
        for model in hosted:
            model.make_room = self._make_room

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread once the version that is being loaded is loaded."""
        self._stop.set()

    def reconcile(self) -> None:
        """Reconcile all models once."""
        desired_state = self._desired()
        self._repository = Repository.read(self._settings, self._repository)
        for hosted in self._hosted:
            before = hosted.held, hosted.takes_tasks
            desired = desired_state.of(hosted.name)
            # A model whose packages are all gone keeps its loaded versions.
            model = self._repository.models.get(hosted.name, hosted.model)
            hosted.reconcile(desired.applied(model), desired)
            self._unload_idle(hosted)
            if (hosted.held, hosted.takes_tasks) != before:
                self._changed()
            try:
                self._adopt_newest(hosted, desired)
            except BrokerUnavailable as exc:
                logger.warning("cannot read which workers have loaded %s: %s", hosted.name, exc)

    def _desired(self) -> Desired:
        try:
            return self._deployments.read()
        except BrokerUnavailable as exc:
            logger.warning("cannot read the desired state of the models: %s", exc)
            return Desired(-1, {hosted.name: hosted.desired for hosted in self._hosted})

    def _run(self) -> None:
        changes: PubSub | None = None
        while not self._stop.is_set():
            try:
                if changes is None:
                    changes = self._client.pubsub(  # type: ignore[no-untyped-call]
                        ignore_subscribe_messages=True
                    )
                    changes.subscribe(self._deployments.key)
                    self._try_to_reconcile()
                self._load_for_first_use(changes.get_message(timeout=self._pause_s()))
                self._try_to_reconcile()
            except (*UNAVAILABLE, redis.ResponseError) as exc:
                logger.warning("cannot listen for changes of the desired state: %s", exc)
                if changes is not None:
                    changes.close()
                    changes = None
                self._stop.wait(self._settings.reconcile_interval_s)

    def _pause_s(self) -> float:
        draining = any(h.drains(version) for h in self._hosted for version in h.ready)
        return DRAIN_S if draining else self._settings.reconcile_interval_s

    def _try_to_reconcile(self) -> None:
        try:
            self.reconcile()
        except (PackageError, OSError) as exc:
            logger.error("the model repository cannot be read again: %s", exc)
        except Exception:
            logger.exception("the models could not be reconciled; trying again")

    def _load_for_first_use(self, message: dict[str, object] | None) -> None:
        """Load the version that a message names as `<model>/<version>`; ignore other messages."""
        data = b"" if message is None else message["data"]
        assert isinstance(data, bytes)
        name, _, version = data.decode(errors="replace").partition("/")
        for hosted in self._hosted:
            if hosted.name == name and version.isdecimal():
                try:
                    hosted.engine(int(version))
                except InfernoError as exc:
                    logger.error("%s version %s is not loaded: %s", name, version, exc)
                self._changed()

    def _unload_idle(self, hosted: HostedModel) -> None:
        now, limit_s = time.monotonic(), self._settings.idle_unload_s
        for used_at, version in hosted.idle():
            longest_s = DRAIN_S if hosted.drains(version) else limit_s
            if longest_s is not None and now - used_at >= longest_s:
                hosted.unload(version)

    def _make_room(self, package: Package, evict: bool) -> None:
        """Unload the least recently used versions, until a package fits into the memory budget.

        Args:
          package: the version to load.
          evict: whether others may be unloaded.
        Raises:
          NoRoom: the remaining versions must stay.
        """
        budget = self._settings.memory_budget_bytes
        if budget is None:
            return
        # The memory of a version is unknown before it is loaded; most of it is its files.
        needed = sum(size for _, _, size in package.seen)
        while (taken := sum(h.memory_bytes for h in self._hosted)) + needed > budget:
            idle = sorted(
                (used_at, hosted.name, version, hosted)
                for hosted in self._hosted
                for used_at, version in hosted.idle()
            )
            if not idle or not evict:
                raise NoRoom(
                    f"it needs about {needed} bytes, and {taken} of "
                    f"INFERNO_REPOSITORY__MEMORY_BUDGET_BYTES={budget} are taken"
                )
            *_, version, hosted = idle[0]
            hosted.unload(version)

    def _adopt_newest(self, hosted: HostedModel, desired: Deployment) -> None:
        """Send traffic to the newest version that all workers of a model have loaded."""
        if not hosted.model.follows_latest or self._settings.preload == "none":
            return
        common = set(hosted.ready) - desired.withdrawn
        if not hosted.takes_tasks or not common:
            return
        for report in self._cluster.workers(0.0):
            if report.state == "ready" and hosted.name in report.models:
                common &= set(report.models[hosted.name])
        newest = max(common, default=0)
        present = [v for v in desired.weights if v in hosted.model.versions]
        if newest and newest not in desired.weights and newest > max(present, default=0):
            self._deployments.change(hosted.name, lambda now: _adopted(now, desired, newest))
            logger.info("%s version %s answers from now on", hosted.name, newest)


def _adopted(now: Deployment, seen: Deployment, newest: int) -> Deployment:
    """Return a deployment whose version `newest` answers; unchanged if it differs from `seen`."""
    return replace(now, weights={newest: 1.0}) if now == seen else now
