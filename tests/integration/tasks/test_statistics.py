"""What a version's tasks have come to is exact, whatever happened to them on their way."""

from __future__ import annotations

from inferno import names
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import wait_until
from tasks.state.statistics import Duration, Statistics
from tests.integration.conftest import occupied, send


def passes(statistics: Statistics, model: str) -> dict[int, int]:
    """Return how many forward passes there were of each size."""
    found = statistics.read(model, 1)
    assert found.execution_count == sum(one.compute_infer.count for one in found.batch_stats)
    return {one.batch_size: one.compute_infer.count for one in found.batch_stats}


def test_each_task_counts_once_by_what_became_of_it(
    repository, start_worker, celery, statistics, records, control, submit
):
    repository.add("exact", batching={"max_batch_size": 4})
    assert statistics.read("exact", 1) == statistics.read("exact", 2)
    # Neither of these is in a pass.
    cancelled = submit("exact", "cancelled")
    control.cancel(cancelled)
    late = send(celery, "exact", "late", expires=-1)
    with start_worker("exact"):
        late.get(timeout=20, propagate=False)
        with occupied(celery, "exact", repository) as wait_for:
            crowd = [send(celery, "exact", text) for text in ("a", "b", "c", "poison")]
            wait_for(4)
        for task in crowd:
            task.get(timeout=20, propagate=False)
        assert records.fetch(cancelled)[0].state is TaskState.CANCELLED
        # The gate; all four, which fail; both halves, and the members of the one that fails.
        assert passes(statistics, "exact") == {1: 1 + 2, 2: 2, 4: 1}
        before = statistics.read("exact", 1)
        assert (before.success.count, before.inference_count, before.fail.count) == (4, 4, 3)

        # More rows than a pass takes.
        send(celery, "exact", [f"row {n}" for n in range(10)]).get(timeout=20)
        assert passes(statistics, "exact") == {1: 3, 2: 3, 4: 3}

        # Two attempts, and three of one that fails.
        send(celery, "exact", "once:a").get(timeout=20)
        send(celery, "exact", "never").get(timeout=20, propagate=False)
        assert passes(statistics, "exact") == {1: 3 + 2 + 3, 2: 3, 4: 3}

    found = statistics.read("exact", 1)
    assert (found.success.count, found.inference_count, found.fail.count) == (6, 15, 4)
    assert found.queue.count == found.compute_infer.count == found.success.count
    assert found.cache_hit.count == found.hits == found.misses == 0
    # A task is over after all that was done for it.
    parts = (found.queue, found.compute_input, found.compute_infer, found.compute_output)
    assert all(part.ns > 0 for part in parts)
    assert sum(part.ns for part in parts) < found.success.ns
    assert before.last_inference < found.last_inference


def test_what_a_killed_worker_had_begun_counts_once(
    repository, start_worker, celery, statistics, client
):
    repository.add("cut-off", batching={"max_batch_size": 4})
    gate = repository.root.parent / "gate"
    with start_worker("cut-off") as victim:
        tasks = [send(celery, "cut-off", [f"hold:{gate}", "x"]), send(celery, "cut-off", "y")]
        wait_until(lambda: f"hold:{gate}" in repository.ran())
        victim.kill()
        gate.touch()
        with start_worker("cut-off"):
            for task in tasks:
                task.get(timeout=30)
    found = statistics.read("cut-off", 1)
    assert (found.success.count, found.inference_count, found.fail.count) == (2, 3, 0)
    # The pass that was cut off has told nobody of itself.
    rows = sum(size * count for size, count in passes(statistics, "cut-off").items())
    assert rows == 3


def test_a_number_that_is_full_holds_nothing_up(
    repository, start_worker, celery, statistics, client, settings
):
    repository.add("brimful")
    key = names.statistics_key(settings.redis.prefix, "brimful", 1)
    full_ns = 2**63 - 1
    client.hset(key, mapping={"computed_ns": full_ns, "batch:1:infer_ns": full_ns})
    with start_worker("brimful"):
        for text in ("a", "b"):
            send(celery, "brimful", text).get(timeout=20)
    found = statistics.read("brimful", 1)
    assert found.success == Duration(2, full_ns)
    assert found.execution_count == 2
