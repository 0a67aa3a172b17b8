"""Statistics of each version: exact counts and durations of its tasks, since Redis was empty.

Each version has one hash. The scripts that accept and settle tasks write it in the same step, so a
task counts once, however often it was delivered, and an outcome that is dropped does not count.

    accept  counts hits, misses and followers (step "submit")
    count   a command of `Transitions.finish`: the numbers of one task (step "settle"). The script
            adds up the numbers of a batch and writes the sums once
    share   a command of `Transitions.finish`: also counts the followers that a result answers
    passed  commands for the forward passes of a batch, if any of its outcomes was written

A task is *computed* if it was in a forward pass and succeeded. A hit, a follower, and a twin in a
batch (*deduplicated*) succeed with another task's result. A task of an ensemble is *composed* of
the results of its stages.

On brokers other than Redis Streams, the passes of a batch may count twice: when the connection is
lost while the batch is settled, and one of its members is tried again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
import redis

from inferno import names
from inferno.batching.latency import Pass
from inferno.settings import Settings
from tasks.broker.connection import translated

#: Longest duration that is counted, in seconds. A longer one comes from a wrong clock: any Celery
#: client may send an `accepted_at`.
_LONGEST_S = 30 * 86400.0


class Duration(msgspec.Struct, frozen=True):
    """The count of an event, and its total duration."""

    count: int = 0
    #: Nanoseconds.
    ns: int = 0


class BatchStatistics(msgspec.Struct, frozen=True):
    """The forward passes of one batch size."""

    #: Rows, without padding.
    batch_size: int
    #: Duration of each phase of the passes; a pass that failed counts in the phases it completed.
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class VersionStatistics(msgspec.Struct, frozen=True):
    """The statistics of a version, as Triton's statistics extension defines them."""

    #: Time at which a batch was last settled, in milliseconds since the epoch; 0 for never.
    last_inference: int = 0
    #: Rows of the tasks that were computed or composed.
    inference_count: int = 0
    #: Forward passes, including those that failed.
    execution_count: int = 0
    #: Tasks that succeeded, from acceptance to outcome.
    success: Duration = Duration()
    #: Tasks that failed, expired or were cancelled, from acceptance to outcome.
    fail: Duration = Duration()
    #: Tasks that succeeded, from acceptance to the start of their batch. Tasks that were not
    #: computed add no time: `cache_hit` has all of theirs.
    queue: Duration = Duration()
    #: Tasks that were computed: preparing and collating their inputs. Each task counts the full
    #: duration of its forward passes.
    compute_input: Duration = Duration()
    #: The same tasks: the runtime.
    compute_infer: Duration = Duration()
    #: The same tasks: postprocessing, checking, splitting and writing their results.
    compute_output: Duration = Duration()
    #: Tasks that succeeded with another task's result, from acceptance to outcome. A hit counts no
    #: time.
    cache_hit: Duration = Duration()
    batch_stats: tuple[BatchStatistics, ...] = ()
    #: Tasks that a kept result answered.
    hits: int = 0
    #: Tasks that looked for a kept result and found none.
    misses: int = 0
    #: Tasks that followed a leader. Not all of them got its result.
    coalesced: int = 0
    #: Tasks that the result of a twin in their batch answered.
    deduplicated: int = 0


class Statistics:
    """Reads the statistics of versions."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where the statistics are.

        Args:
          client: answers in bytes.
          settings: key prefix.
        """
        self._redis = client
        self._prefix = settings.redis.prefix

    def read(self, model: str, version: int) -> VersionStatistics:
        """Return the statistics of one version; all zero when it has none.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        (found,) = self.read_all([(model, version)])
        return found

    def read_all(self, pairs: Iterable[tuple[str, int]]) -> list[VersionStatistics]:
        """Return the statistics of several versions, in the same order, in one round trip.

        Args:
          pairs: model and version of each.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            for model, version in pairs:
                pipe.hgetall(names.statistics_key(self._prefix, model, version))
            return [_read(found) for found in cast(list[dict[bytes, bytes]], pipe.execute())]


class Tally:
    """Builds the commands of `Transitions.finish` that count outcomes."""

    def __init__(self, settings: Settings) -> None:
        """Store the key prefix."""
        self._prefix = settings.redis.prefix

    def computed(
        self,
        model: str,
        version: int,
        total_s: float,
        queue_s: float,
        took: Sequence[Pass],
        rows: int,
    ) -> dict[str, Any]:
        """Return the command for a task that was computed or composed.

        Args:
          model: the model that ran it.
          version: version of that model.
          total_s: seconds from its acceptance to its outcome.
          queue_s: seconds from its acceptance to the start of its batch.
          took: its forward passes; a task of an ensemble has none.
          rows: rows of its inputs.
        """
        input_ns = infer_ns = output_ns = 0
        for one in took:
            input_ns += one.input_ns
            infer_ns += one.infer_ns
            output_ns += one.output_ns
        kind = "computed" if took else "composed"
        numbers = {
            f"{kind}_count": 1,
            f"{kind}_ns": _ns(total_s),
            "queue_ns": _ns(queue_s),
            "compute_input_ns": input_ns,
            "compute_infer_ns": infer_ns,
            "compute_output_ns": output_ns,
            "inference_count": rows,
        }
        return self._count(model, version, numbers)

    def deduplicated(self, model: str, version: int, total_s: float) -> dict[str, Any]:
        """Return the command for a task that the result of its twin answered."""
        numbers = {"deduplicated_count": 1, "deduplicated_ns": _ns(total_s)}
        return self._count(model, version, numbers)

    def failed(self, model: str, version: int, accepted_at: float) -> dict[str, Any]:
        """Return the command for a task that ends now without a result.

        Args:
          model: the task's model.
          version: version of that model.
          accepted_at: seconds since the epoch.
        """
        total_s = time.time() - accepted_at
        return self._count(model, version, {"fail_count": 1, "fail_ns": _ns(total_s)})

    def passed(self, model: str, version: int, passes: Iterable[Pass]) -> list[list[Any]]:
        """Return the commands for the forward passes of a batch that is settled now."""
        key = names.statistics_key(self._prefix, model, version)
        by_rows: dict[int, list[Pass]] = defaultdict(list)
        for one in passes:
            by_rows[one.rows].append(one)
        commands: list[list[Any]] = [["HSET", key, "last_inference", round(time.time() * 1000)]]
        for rows, equal in by_rows.items():
            sums = {
                "count": len(equal),
                "input_ns": sum(one.input_ns for one in equal),
                "infer_ns": sum(one.infer_ns for one in equal),
                "output_ns": sum(one.output_ns for one in equal),
            }
            commands += (["HINCRBY", key, f"batch:{rows}:{name}", n] for name, n in sums.items())
        return commands

    def _count(self, model: str, version: int, numbers: Mapping[str, int]) -> dict[str, Any]:
        key = names.statistics_key(self._prefix, model, version)
        return {"kind": "count", "statistics": key, "numbers": numbers}


def _ns(seconds: float) -> int:
    # Clocks of two machines may differ.
    return round(min(max(seconds, 0.0), _LONGEST_S) * 1e9)


def _read(found: Mapping[bytes, bytes]) -> VersionStatistics:
    """Return the statistics from their hash."""
    passes: dict[int, dict[str, int]] = defaultdict(dict)
    numbers: dict[str, int] = {}
    for field, value in found.items():
        kind, _, rest = field.decode().partition(":")
        if kind == "batch":
            rows, _, name = rest.partition(":")
            passes[int(rows)][name] = int(value)
        else:
            numbers[kind] = int(value)

    def duration(*names: str) -> Duration:
        return Duration(
            sum(numbers.get(f"{name}_count", 0) for name in names),
            sum(numbers.get(f"{name}_ns", 0) for name in names),
        )

    computed = duration("computed")
    success = duration("computed", "composed", "deduplicated", "shared", "hit")
    return VersionStatistics(
        last_inference=numbers.get("last_inference", 0),
        inference_count=numbers.get("inference_count", 0),
        execution_count=sum(one["count"] for one in passes.values()),
        success=success,
        fail=duration("fail"),
        queue=Duration(success.count, numbers.get("queue_ns", 0)),
        compute_input=Duration(computed.count, numbers.get("compute_input_ns", 0)),
        compute_infer=Duration(computed.count, numbers.get("compute_infer_ns", 0)),
        compute_output=Duration(computed.count, numbers.get("compute_output_ns", 0)),
        cache_hit=duration("deduplicated", "shared", "hit"),
        batch_stats=tuple(_batch(rows, one) for rows, one in sorted(passes.items())),
        hits=numbers.get("hit_count", 0),
        misses=numbers.get("miss_count", 0),
        coalesced=numbers.get("coalesced_count", 0),
        deduplicated=numbers.get("deduplicated_count", 0),
    )


def _batch(rows: int, numbers: Mapping[str, int]) -> BatchStatistics:
    count = numbers["count"]
    return BatchStatistics(
        rows,
        Duration(count, numbers["input_ns"]),
        Duration(count, numbers["infer_ns"]),
        Duration(count, numbers["output_ns"]),
    )
