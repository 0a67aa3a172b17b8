"""What the tasks of each version have come to: exact counts and durations, since Redis was empty.

There is one hash for each version, and one truth: what is in it is written by the scripts that
accept and settle tasks, in the same step. So a task counts once, however often it was delivered,
and an outcome that is dropped counts for nothing.

    COUNT   a command of `Transitions.finish`: what a task that is over counts for. The numbers of
            a batch are added up, so that Redis writes them once
    passed  commands for the forward passes of a batch, if any of its outcomes was taken
    share   counts the followers that a leader's result answers (`tasks.state.sharing`)
    accept  counts hits, misses and followers (`tasks.state.sharing`)

A task is *computed* if it was in a forward pass and succeeded. Others succeed with the result of
another task: hits, followers, and twins in a batch (*deduplicated*); those of ensembles are
*composed* of what their stages give.

On brokers other than Redis Streams, the passes of a batch may be counted twice if the connection is
lost while it is settled and one of its members is tried again.
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


class Duration(msgspec.Struct, frozen=True):
    """How often something happened, and how long it took together."""

    count: int = 0
    ns: int = 0


class BatchStatistics(msgspec.Struct, frozen=True):
    """The forward passes of one size."""

    #: Rows, without those that only pad.
    batch_size: int
    #: Passes, and what they took together; one that failed, in the phases that it got through.
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class VersionStatistics(msgspec.Struct, frozen=True):
    """What the tasks of a version have come to, as Triton's statistics extension counts it."""

    #: When a batch was settled last; milliseconds since the epoch, 0 for never.
    last_inference: int = 0
    #: Rows of the tasks that were computed or composed.
    inference_count: int = 0
    #: Forward passes, also those that failed.
    execution_count: int = 0
    #: Tasks that succeeded, from acceptance to outcome.
    success: Duration = Duration()
    #: Tasks that failed, expired or were cancelled, from acceptance to outcome.
    fail: Duration = Duration()
    #: Tasks that succeeded, from acceptance to the beginning of their batch; those that were not
    #: computed are in `cache_hit` all the time.
    queue: Duration = Duration()
    #: Tasks that were computed, each with all that its forward passes took: prepare and collate;
    #: the runtime; postprocess, check, split and the writing of results.
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    #: Tasks that succeeded with the result of another one, from acceptance to outcome. What a kept
    #: result takes is not measured.
    cache_hit: Duration = Duration()
    batch_stats: tuple[BatchStatistics, ...] = ()
    #: Tasks that were answered with a kept result, and those that looked for one in vain.
    hits: int = 0
    misses: int = 0
    #: Tasks that followed another one. Not all got its result.
    coalesced: int = 0
    #: Tasks that were answered with the result of a twin in their batch.
    deduplicated: int = 0


class Statistics:
    """Reads what versions have come to."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where it is.

        Args:
          client: answers in bytes.
          settings: the prefix of keys.
        """
        self._redis = client
        self._prefix = settings.redis.prefix

    def read(self, model: str, version: int) -> VersionStatistics:
        """Return what one version has come to; all zero where nothing is known of it.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        (found,) = self.read_all([(model, version)])
        return found

    def read_all(self, pairs: Iterable[tuple[str, int]]) -> list[VersionStatistics]:
        """Return what several versions have come to, in the same order, in one round trip.

        Args:
          pairs: models and versions.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            for model, version in pairs:
                pipe.hgetall(names.statistics_key(self._prefix, model, version))
            return [_read(found) for found in cast(list[dict[bytes, bytes]], pipe.execute())]


class Tally:
    """Says what outcomes count for, as commands of `Transitions.finish`."""

    def __init__(self, settings: Settings) -> None:
        """Store the prefix of keys."""
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
        """Return the command for a task that was computed, or composed.

        Args:
          model: that ran it.
          version: of that model.
          total_s: seconds from its acceptance to its outcome.
          queue_s: seconds from its acceptance to the beginning of its batch.
          took: the forward passes that it was in; none, of an ensemble.
          rows: of its inputs.
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
        """Return the command for a task that was answered with the result of its twin."""
        numbers = {"deduplicated_count": 1, "deduplicated_ns": _ns(total_s)}
        return self._count(model, version, numbers)

    def failed(self, model: str, version: int, accepted_at: float) -> dict[str, Any]:
        """Return the command for a task that ends now, and has not succeeded."""
        total_s = time.time() - accepted_at
        return self._count(model, version, {"fail_count": 1, "fail_ns": _ns(total_s)})

    def passed(self, model: str, version: int, passes: Iterable[Pass]) -> list[list[Any]]:
        """Return the commands for a batch that is settled now, and its forward passes."""
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
    # The two ends may come from the clocks of two machines.
    return round(min(max(seconds, 0.0), _LONGEST_S) * 1e9)


def _read(found: Mapping[bytes, bytes]) -> VersionStatistics:
    """Return what a hash says; see `VersionStatistics` for what belongs to what."""
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
        batch_stats=tuple(
            BatchStatistics(
                rows,
                Duration(one["count"], one["input_ns"]),
                Duration(one["count"], one["infer_ns"]),
                Duration(one["count"], one["output_ns"]),
            )
            for rows, one in sorted(passes.items())
        ),
        hits=numbers.get("hit_count", 0),
        misses=numbers.get("miss_count", 0),
        coalesced=numbers.get("coalesced_count", 0),
        deduplicated=numbers.get("deduplicated_count", 0),
    )


#: What takes longer has a wrong clock, or none: a client of Celery may say anything.
_LONGEST_S = 30 * 86400.0
