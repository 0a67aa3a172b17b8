"""Work that is done once: kept results, and tasks in flight that share one computation.

Tasks with equal inputs, for the same content of the same version, have the same *shared key*. When
one of them is accepted, the script that does so

    finds a kept result    and settles the task in the same step, or
    finds a leader         a task with that key that waits or runs, and lets this one follow it, or
    puts it into its lane  where it leads those that come after it.

The script that settles a leader settles its followers, too, and keeps the result. When a leader
ends in any other way, its followers are put into their lane, each for itself: nobody's fate depends
on another client's deadline or cancellation. A follower's message is an entry of a stream, as one
in a lane is, so that it is cancelled and expires in the same way.

Keys, behind `names.cache_keys`:

    kept:<key>       a result without its ending, see `text_for_others`
    index, sizes     shared keys of the kept results, by the time when they expire; their bytes
    leader:<key>     the key of the leader's record
    followers:<key>  a stream: what each follower asks, and how it is to be told
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
from inferno.repository.repository import Package
from inferno.settings import Settings

#: Tasks that follow one leader, at most: one step settles them all.
MOST_FOLLOWERS = 1000


@dataclass(frozen=True)
class Sharing:
    """How a task may be answered with another one's result."""

    #: Equal for tasks whose results are interchangeable.
    key: str
    #: `<model>/<version>`, and `Package.digest` as this process has read it.
    package: str
    digest: str
    model: str
    version: int
    #: Whether a kept result will do, and whether that of a task in flight.
    results: bool
    coalesce: bool
    #: The packed message of its webhook for `completed`, and the lane that takes it.
    webhook: bytes | None = None
    webhook_lane: str = ""

    @classmethod
    def of(
        cls, package: Package, inputs: Tensors, outputs: Sequence[str] | None, codec: str | None
    ) -> Sharing | None:
        """Return how a task of a version shares, or None when the version does not.

        Args:
          package: the version.
          inputs: as `Signature.parse` returns them.
          outputs: those that the client wants; None for all.
          codec: how it wants numbers to be written; None for what the package says.
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
    """Of a stored result, what is the same for all whom it answers."""

    outputs: msgspec.Raw
    model: msgspec.Raw
    version: msgspec.Raw
    batch: msgspec.Raw
    worker: msgspec.Raw


class _Payload(msgspec.Struct):
    result: _Parts


_decode_payload = msgspec.json.Decoder(_Payload).decode


def text_for_others(payload: bytes) -> bytes:
    """Return the beginning of a result, which scripts end with another task's own times.

    Args:
      payload: the outcome of a task that succeeded, as `tasks.state.outcomes.encode_outcome`.
    """
    parts = _decode_payload(payload).result
    return (
        b'{"outputs":%b,"model":%b,"version":%b,"batch":%b,"worker":%b,'
        b'"timings":{"batch_wait_ms":0.0,"inference_ms":0.0,"queue_ms":'
        % (parts.outputs, parts.model, parts.version, parts.batch, parts.worker)
    )


class Sharer:
    """Says what happens to others when a task is over, as commands of `Transitions.finish`."""

    def __init__(self, settings: Settings) -> None:
        """Store the limits of what is kept."""
        self._prefix = settings.redis.prefix
        self._keys = names.cache_keys(settings.redis.prefix)
        self._cache = settings.cache

    def succeeded(
        self, package: Package, arguments: Mapping[str, Any], payload: bytes
    ) -> list[dict[str, Any]]:
        """Return the commands that keep a result and answer the followers with it.

        Args:
          package: that gave it.
          arguments: of the task's message.
          payload: its outcome.
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
        # The web tier may have read another content of this version than this worker has.
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
        """Return the commands that let followers run for themselves."""
        key = self._key(arguments)
        return [] if key is None else self.disbanded(key)

    def disbanded(self, key: str) -> list[dict[str, Any]]:
        """Return the commands that let the followers of a shared key run for themselves."""
        return [{"kind": "disband", "cache": self._keys, "key": key}]

    def _key(self, arguments: Mapping[str, Any]) -> str | None:
        # The web tier has decided it, and its package may have said something else than ours does:
        # whoever follows is not to be forgotten.
        key = arguments.get("cache")
        return key if isinstance(key, str) else None
