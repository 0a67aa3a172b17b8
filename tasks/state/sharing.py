"""Equal tasks share one computation: through kept results, and by following a task in flight.

Tasks with equal inputs for the same content of the same version have the same *shared key*. The
step that accepts a task (step "submit") looks for this key:

    a kept result    settles the task at once
    a leader         a task with this key that waits or runs: the new task follows it
    neither          the task goes into its lane, and leads the equal tasks after it

The step that settles a leader with a result (step "settle") keeps that result and settles the
followers with it. When a leader ends in another way, its followers go into their lane: no task
depends on the deadline or the cancellation of another client's task. A follower's message is a
stream entry, as in a lane, so a follower is cancelled and expires like any other task.

Keys, after the prefix `names.cache_keys`:

    kept:<key>       a result without its ending, see `text_for_others`
    index            the shared keys of kept results, by the time at which they expire
    sizes            the sizes of kept results in bytes
    leader:<key>     the key of the leader's record
    followers:<key>  a stream: the message of each follower, and how to announce its outcome
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from inferno import names
from inferno.protocol.digest import digest
from inferno.protocol.tensors import Tensors
from inferno.repository.package import Package
from inferno.settings import Settings

#: Most followers of one leader: one step settles them all, and blocks Redis meanwhile.
MOST_FOLLOWERS = 1000


@dataclass(frozen=True)
class Sharing:
    """How another task's result may answer a task."""

    #: The shared key: equal for tasks whose results are interchangeable.
    key: str
    #: `<model>/<version>`.
    package: str
    #: `Package.digest`, as this process has read it.
    digest: str
    model: str
    version: int
    #: Whether a kept result may answer the task.
    results: bool
    #: Whether the task may follow a leader.
    coalesce: bool
    #: Packed message of the task's webhook for `completed`; None without such a webhook.
    webhook: bytes | None = None
    #: Key of the lane of webhooks.
    webhook_lane: str = ""

    @classmethod
    def of(
        cls, package: Package, inputs: Tensors, outputs: Sequence[str] | None, codec: str | None
    ) -> Sharing | None:
        """Return how a task of a version may share, or None when the version does not share.

        Args:
          package: the version.
          inputs: arrays, from `Signature.parse`.
          outputs: names of the outputs that the client wants; None for all.
          codec: encoding of tensors that the client wants; None for the package's default.
        """
        if not (package.keeps_results or package.coalesces):
            return None
        written = codec or package.manifest.codecs.default
        wanted = "" if outputs is None else ",".join(sorted(set(outputs)))
        place = f"{package.name}/{package.version}"
        return cls(
            key=f"{place}/{package.digest}/{digest(inputs)}/{written}/{wanted}",
            package=place,
            digest=package.digest,
            model=package.name,
            version=package.version,
            results=package.keeps_results,
            coalesce=package.coalesces,
        )

    def fields(self, prefix: str, task_id: str) -> dict[str, Any]:
        """Return this as `accept.lua` takes it."""
        fields = {
            "key": self.key,
            "package": self.package,
            "digest": self.digest,
            "statistics": names.statistics_key(prefix, self.model, self.version),
            "result": names.result_key(task_id),
            "results": self.results,
            "coalesce": self.coalesce,
        }
        if self.webhook is not None:
            fields["webhook"] = {"lane": self.webhook_lane, "message": self.webhook}
        return fields


class _Parts(msgspec.Struct):
    """The fields of a result that are the same for every task it answers."""

    outputs: msgspec.Raw
    model: msgspec.Raw
    version: msgspec.Raw
    batch: msgspec.Raw
    worker: msgspec.Raw


class _Payload(msgspec.Struct):
    result: _Parts


_decode_payload = msgspec.json.Decoder(_Payload).decode


def text_for_others(payload: bytes) -> bytes:
    """Return a result without its ending; scripts append the times of the task that it answers.

    Args:
      payload: the outcome of a task that succeeded, from `tasks.state.outcomes.encode_outcome`.
    """
    parts = _decode_payload(payload).result
    return (
        b'{"outputs":%b,"model":%b,"version":%b,"batch":%b,"worker":%b,'
        b'"timings":{"batch_wait_ms":0.0,"inference_ms":0.0,"queue_ms":'
        % (parts.outputs, parts.model, parts.version, parts.batch, parts.worker)
    )


class Sharer:
    """Builds the commands of `Transitions.finish` that answer or release followers."""

    def __init__(self, settings: Settings) -> None:
        """Store the key prefix and the limits of kept results."""
        self._prefix = settings.redis.prefix
        self._keys = names.cache_keys(settings.redis.prefix)
        self._cache = settings.cache

    def succeeded(
        self, package: Package, arguments: Mapping[str, Any], payload: bytes
    ) -> list[dict[str, Any]]:
        """Return the commands that keep a result and answer the followers with it.

        Args:
          package: the version that computed the result.
          arguments: keyword arguments of the task's message.
          payload: the task's outcome.
        """
        key = self._key(arguments)
        if key is None:
            return []
        if not (package.keeps_results or package.coalesces):
            return self.disbanded(key)
        text, now = text_for_others(payload), datetime.now(UTC)
        command: dict[str, Any] = {
            "kind": "share",
            "cache": self._keys,
            "key": key,
            "text": text,
            "now": repr(now.timestamp()),
            "date": now.isoformat(),
            "statistics": names.statistics_key(self._prefix, package.name, package.version),
        }
        # The web tier may have read other files of this version than this worker has loaded.
        current = package.keeps_results and key.startswith(
            f"{package.name}/{package.version}/{package.digest}/"
        )
        ttl_ms = round(1000 * (package.manifest.cache.ttl_s or self._cache.ttl_s))
        if current and ttl_ms > 0 and len(text) <= self._cache.max_result_bytes:
            command["keep"] = {
                "keep_ms": ttl_ms,
                "max_entries": self._cache.max_entries,
                "max_bytes": self._cache.max_bytes,
            }
        return [command]

    def ended(self, package: Package, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the commands that release the followers of a task that ends without a result."""
        key = self._key(arguments)
        return [] if key is None else self.disbanded(key)

    def disbanded(self, key: str) -> list[dict[str, Any]]:
        """Return the commands that put the followers of a shared key into their lane."""
        return [{"kind": "disband", "cache": self._keys, "key": key}]

    def _key(self, arguments: Mapping[str, Any]) -> str | None:
        # The web tier wrote the key into the message. Its package may differ from this worker's,
        # which may not share at all, but the task may have followers.
        key = arguments.get("cache")
        return key if isinstance(key, str) else None
