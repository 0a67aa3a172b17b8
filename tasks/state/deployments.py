"""What is wanted of the models: which versions answer, and which shall be loaded.

It is kept in one hash of Redis, so that it is the same for every front end and worker and outlives
them. Workers bring about what it says (`workers.hosting.reconcile`); front ends choose by it which
version answers. Each change has the next *generation*: the script that accepts a task refuses one
whose version was chosen by an older one, so that once a change is made, it holds for every later
request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import msgspec
import redis

from inferno import names
from inferno.repository.repository import Model, Repository
from inferno.settings import RepositorySettings, Settings
from tasks.broker.connection import translated

#: The field of the hash that holds the generation; no model can be called that.
GENERATION = "#generation"


class Deployment(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is wanted of one model; what it does not say is as in the settings."""

    #: What part of the requests that name no version each version answers, relative to the others'.
    shares: dict[int, float] = {}
    #: Somebody has chosen `shares`, and newer versions do not take over; none means that nothing
    #: answers. Otherwise `shares` is the newest version that all workers had loaded.
    fixed: bool = False
    #: Versions that are kept loaded although they have no share.
    loaded: frozenset[int] = frozenset()
    #: Versions that shall not be loaded, and answer nobody.
    withdrawn: frozenset[int] = frozenset()
    #: How often each version was asked to be loaded: one more means that its files are looked at
    #: again.
    asked: dict[int, int] = {}

    def wants(self, version: int) -> bool:
        """Return whether a version was asked to be loaded."""
        return version in self.shares or version in self.loaded

    def applied(self, model: Model) -> Model:
        """Return a model with the versions that answer.

        Args:
          model: as the repository and the settings have it.
        """
        if self.fixed:
            shares = {v: share for v, share in self.shares.items() if v in model.versions}
            active = max(shares, key=lambda version: shares[version], default=None)
        else:
            shares = {}
            active = self._latest(model)
        return replace(
            model,
            active=active,
            shares=shares if len(shares) > 1 else {},
            withdrawn=self.withdrawn,
            follows_latest=not self.fixed and model.follows_latest,
        )

    def _latest(self, model: Model) -> int | None:
        if not model.follows_latest:
            return None if model.active in self.withdrawn else model.active
        for version in self.shares:
            if version in model.versions and version not in self.withdrawn:
                return version
        return max(model.versions.keys() - self.withdrawn, default=None)


class Desired(msgspec.Struct, frozen=True):
    """What is wanted of all models at one time."""

    generation: int
    models: Mapping[str, Deployment]

    def of(self, model: str) -> Deployment:
        """Return what is wanted of one model."""
        return self.models.get(model, _NOTHING)

    def known(self, repository: Repository) -> bool:
        """Return whether a repository has every version that was asked for."""
        return all(
            name in repository.models
            and (wanted.shares.keys() | wanted.loaded) <= repository.models[name].versions.keys()
            for name, wanted in self.models.items()
        )

    def applied(self, repository: Repository) -> Repository:
        """Return a repository with the versions that answer."""
        models = {
            name: self.models[name].applied(model) if name in self.models else model
            for name, model in repository.models.items()
        }
        return replace(repository, models=models)


class Outdated(Exception):
    """What is wanted of the models has changed since a request's version was chosen."""


_NOTHING = Deployment()
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Deployment).decode


class Deployments:
    """Reads and changes what is wanted of the models."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where it is."""
        self._redis = client
        #: Also the channel on which changes are announced.
        self.key = names.deployments_key(settings.redis.prefix)

    def read(self) -> Desired:
        """Return what is wanted now.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            found = cast(dict[bytes, bytes], self._redis.hgetall(self.key))
        generation = int(found.pop(GENERATION.encode(), 0))
        return Desired(generation, {name.decode(): _decode(value) for name, value in found.items()})

    def change(self, model: str, edit: Callable[[Deployment], Deployment]) -> Deployment:
        """Change what is wanted of one model, and announce it.

        Args:
          model: which.
          edit: makes the new from the present one; called again if that has changed meanwhile.
        Returns:
          what was wanted before.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        before = _NOTHING

        def write(pipe: Any) -> None:
            nonlocal before
            value = pipe.hget(self.key, model)
            before = _NOTHING if value is None else _decode(value)
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
        """Have the workers look at once; with a version, load that for a first use.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            self._redis.publish(self.key, model if version is None else f"{model}/{version}")


def is_pinned(settings: RepositorySettings, model: str, version: int) -> bool:
    """Return whether the settings keep a loaded version in memory."""
    return model in settings.pinned or f"{model}/{version}" in settings.pinned
