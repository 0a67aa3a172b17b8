"""The desired state of the models: which versions answer, and which are to be loaded.

One hash in Redis holds it, so that every front end and worker sees the same state, also after a
restart. Workers bring it about (`workers.hosting.reconcile`); front ends choose the version of a
task by it (step "submit"). Each change increments the *generation*. The script that accepts a task
refuses a version that was chosen under an older generation, so a change holds for every request
after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import msgspec
import redis

from inferno import names
from inferno.repository.repository import Model, Repository
from inferno.settings import Settings
from tasks.broker.connection import translated

#: Field of the hash that holds the generation; no model can have this name.
GENERATION = "#generation"


#: Names of fields as they are stored.
_STORED = {"weights": "shares", "pinned": "fixed", "load_generations": "asked"}


class Deployment(msgspec.Struct, frozen=True, omit_defaults=True, rename=_STORED):
    """The desired state of one model; the settings decide what it leaves open."""

    #: Weight of each version in the requests that name no version.
    weights: dict[int, float] = {}
    #: Whether an operator has chosen `weights`, so that newer versions do not take over; if there
    #: are none, no version answers. Otherwise `weights` is the newest version that all workers had
    #: loaded.
    pinned: bool = False
    #: Versions without a weight that are kept loaded.
    loaded: frozenset[int] = frozenset()
    #: Versions that are not loaded and answer no request.
    withdrawn: frozenset[int] = frozenset()
    #: How often an operator has asked to load each version. After an increase, workers read its
    #: files again.
    load_generations: dict[int, int] = {}

    def wants(self, version: int) -> bool:
        """Return whether an operator has asked to load a version."""
        return version in self.weights or version in self.loaded

    def applied(self, model: Model) -> Model:
        """Return a model with the versions that answer.

        Args:
          model: as the repository and the settings describe it.
        """
        if self.pinned:
            weights = {v: weight for v, weight in self.weights.items() if v in model.versions}
            active = max(weights, key=lambda version: weights[version], default=None)
        else:
            weights = {}
            active = self._latest(model)
        return replace(
            model,
            active=active,
            shares=weights if len(weights) > 1 else {},
            withdrawn=self.withdrawn,
            follows_latest=not self.pinned and model.follows_latest,
        )

    def _latest(self, model: Model) -> int | None:
        if not model.follows_latest:
            return None if model.active in self.withdrawn else model.active
        for version in self.weights:
            if version in model.versions and version not in self.withdrawn:
                return version
        return max(model.versions.keys() - self.withdrawn, default=None)


class Desired(msgspec.Struct, frozen=True):
    """The desired state of all models at one time."""

    generation: int
    models: Mapping[str, Deployment]

    def of(self, model: str) -> Deployment:
        """Return the desired state of one model."""
        return self.models.get(model, _NOTHING)

    def known(self, repository: Repository) -> bool:
        """Return whether a repository has every version that an operator has asked for."""
        return all(
            name in repository.models
            and (desired.weights.keys() | desired.loaded) <= repository.models[name].versions.keys()
            for name, desired in self.models.items()
        )

    def applied(self, repository: Repository) -> Repository:
        """Return a repository with the versions that answer."""
        models = {
            name: self.models[name].applied(model) if name in self.models else model
            for name, model in repository.models.items()
        }
        return replace(repository, models=models)


class Outdated(Exception):
    """The desired state has changed since the version of a task was chosen."""


logger = logging.getLogger(__name__)

_NOTHING = Deployment()
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Deployment).decode


def _read(value: bytes) -> Deployment:
    """Return a desired state; what cannot be read counts as none, and the settings decide."""
    try:
        return _decode(value)
    except msgspec.DecodeError as exc:
        logger.error("the desired state of a model cannot be read: %s", exc)
        return _NOTHING


class Deployments:
    """Reads and changes the desired state."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where the desired state is kept."""
        self._redis = client
        #: Key of the hash, and the channel on which changes are announced.
        self.key = names.deployments_key(settings.redis.prefix)

    def read(self) -> Desired:
        """Return the desired state.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            found = cast(dict[bytes, bytes], self._redis.hgetall(self.key))
        try:
            generation = int(found.pop(GENERATION.encode(), 0))
        except ValueError:
            logger.error("the generation of the desired state cannot be read")
            generation = 0
        return Desired(
            generation, {name.decode("utf-8", "replace"): _read(v) for name, v in found.items()}
        )

    def change(self, model: str, edit: Callable[[Deployment], Deployment]) -> Deployment:
        """Change the desired state of one model, and announce it.

        Args:
          model: its name.
          edit: returns the new state for the present one. It is called again when another process
            has changed the state meanwhile.
        Returns:
          the state before.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        before = _NOTHING

        def write(pipe: Any) -> None:
            nonlocal before
            value = pipe.hget(self.key, model)
            before = _NOTHING if value is None else _read(value)
            after = edit(before)
            pipe.multi()
            if after != before:
                pipe.hset(self.key, model, _encode(after))
                pipe.hincrby(self.key, GENERATION, 1)
                pipe.publish(self.key, model)

        with translated():
            self._redis.transaction(write, self.key)
        return before

    def nudge(self, model: str, version: int | None = None) -> None:
        """Let the workers read the desired state at once.

        Args:
          model: its name.
          version: a version that they load for its first use, if given.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            self._redis.publish(self.key, model if version is None else f"{model}/{version}")
