"""The demonstrations of bench/scenarios, in small, each with a platform of its own."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from bench.scenarios import crowd, latency, pressure, retries

#: What each scenario is told to be over in a few seconds.
SMALL: dict[str, tuple[Any, dict[str, Any]]] = {
    "crowd": (crowd, {"clients": 100}),
    "latency": (latency, {"rates": {"batched": [20, 100], "alone": [20]}, "seconds": 0.5}),
    "retries": (retries, {"tasks": 60}),
    "pressure": (pressure, {"phases_s": (1.0, 1.0, 3.0, 2.0)}),
}


# They start four platforms.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What each scenario has seen, as it is written to a file."""
    return {
        name: json.loads(json.dumps(module.measure(tmp_path_factory.mktemp(name), **options)))
        for name, (module, options) in SMALL.items()
    }


def test_a_crowd_loses_nothing(documents) -> None:
    tasks = documents["crowd"]["tasks"]

    assert len(tasks) == 100
    assert not [task["problem"] for task in tasks if "problem" in task]
    assert all(task["accepted_s"] <= task["finished_s"] <= task["answered_s"] for task in tasks)
    assert sum(batch["size"] for batch in documents["crowd"]["batches"]) == 100


def test_every_call_of_a_sweep_is_answered(documents) -> None:
    points = documents["latency"]["points"]

    seen = [(point["model"], point["rate_per_s"], point["calls"]) for point in points]
    assert seen == [("batched", 20, 10), ("batched", 100, 50), ("alone", 20, 10)]
    assert {point["mean_batch"] for point in points if point["model"] == "alone"} == {1.0}


def test_a_sweep_that_never_kept_its_promise_says_so(documents) -> None:
    points = [
        point | {"latency_ms": {"p50": 60.0, "p95": 80.0, "p99": 90.0}}
        for point in documents["latency"]["points"]
    ]

    finding, at_best, _ = latency.answer({"sla_ms": 50.0, "points": points})

    assert finding == "No: p95 is under 50 ms up to 0 calls/s with batches, 0 without."
    assert at_best.startswith("At 20 calls/s")
    assert "p95 was 80 ms" in at_best


def test_failed_tasks_are_retried_until_they_succeed_or_leave_a_dead_letter(documents) -> None:
    seen = documents["retries"]
    kinds = [event["kind"] for event in seen["events"]]
    dead = seen["ends"].get("failed", 0)

    assert "retried" in kinds
    assert kinds.count("started") == sum(int(n) * count for n, count in seen["attempts"].items())
    assert kinds.count("succeeded") == seen["ends"]["succeeded"]
    assert sum(seen["ends"].values()) == 60
    assert sum(seen["dead_errors"].values()) == sum(seen["replayed"].values()) == dead


def test_pressure_is_answered_with_refusals_and_passes(documents) -> None:
    seen = documents["pressure"]
    statuses = {call["status"] for call in seen["calls"]}

    assert {200, 429} <= statuses <= {200, 429, 504}
    assert all(call["retry_after_s"] >= 1 for call in seen["calls"] if call["status"] == 429)
    assert max(look["waiting"] for look in seen["looks"]) > 0


@pytest.mark.parametrize("name", SMALL)
def test_what_was_seen_is_told_and_drawn(documents, name, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="pip install -r bench/requirements.txt")
    from bench.scenarios import plots
    from bench.scenarios.__main__ import SCENARIOS

    scenario, document = SCENARIOS[name], documents[name]
    finding, *details = scenario.module.answer(document)
    files = [tmp_path / f"plot.{kind}" for kind in ("svg", "png")]
    plots.save(files, scenario.module.QUESTION, finding, partial(scenario.draw, document), 5.0)

    assert details
    assert finding in files[0].read_text()
    assert files[1].read_bytes().startswith(b"\x89PNG")
