"""One small run of `python -m bench cache`: that equal work is done once, whoever counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import cache
from bench.cache import Repository
from bench.results import Measurement, Results
from bench.workloads import WORKLOADS
from inferno.repository import repository
from inferno.settings import RepositorySettings
from tests.bench.test_run import HAS_WRK, bench, needs_wrk


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What a run prints; its results are in `cache.json`."""
    options = ["--connections", "4", "--seconds", "1", "--warm-up", "0", "--repeats", "1"]
    rows = ["--rows", "1,2" if HAS_WRK else "2"]
    place = ["--output", str(folder / "cache.json")]
    return bench("cache", "--workloads", "simulated", *options, *rows, *place, folder=folder)


@pytest.fixture
def measured(output: str, folder: Path) -> dict[str, Measurement]:
    results = Results.read(folder / "cache.json")
    assert results.failures == []
    return {m.scenario: m for m in results.measurements}


def answered(measurement: Measurement) -> tuple[int | None, dict[str, int]]:
    """Return how many answers said `cached`, and the errors; of a loop that was answered."""
    assert measurement.answered
    return measurement.cached, measurement.errors


def test_hits_say_that_they_are_cached_and_nothing_else_does(measured):
    hits = measured["http x2, 2 rows, hits"]
    assert answered(hits) == (hits.answered, {})
    assert hits.mean_batch is None
    assert answered(measured["http x2, 2 rows, misses"]) == (0, {})
    assert answered(measured["http x2, 2 rows, cache off"]) == (0, {})


@needs_wrk
def test_wrk_repeats_the_texts_of_hits_and_no_others(measured):
    hits = measured["http x4, hits"]
    assert answered(hits) == (hits.answered, {})
    assert answered(measured["http x4, misses"]) == (0, {})
    assert answered(measured["http x4, cache off"]) == (0, {})


def test_equal_calls_at_once_are_computed_once(measured):
    equal, different = (measured[f"64 {kind} calls at once"] for kind in ("equal", "different"))
    assert equal.answered == different.answered == 64
    # As the model itself counts it.
    assert (equal.values["passes"], equal.values["rows"]) == (1, 1)
    assert equal.values["misses"] == 1
    assert equal.values["hits"] + equal.values["coalesced"] == 63
    # Those who followed another one are not answered with a kept result.
    assert equal.values["cached"] == equal.values["hits"]
    assert different.values["rows"] == different.values["misses"] == 64
    assert different.values["cached"] == 0


def test_equal_members_of_a_batch_are_computed_once(measured):
    twins = measured["32 waiting, 4 different"]
    assert twins.values["rows"] + twins.values["deduplicated"] == twins.answered
    # Not every drain has to be one batch; none has as many rows as tasks.
    assert twins.values["passes"] * cache.DIFFERENT >= twins.values["rows"]
    assert twins.values["rows"] < twins.answered / 2


def test_what_was_measured_is_shown_and_compared(output, folder):
    file = str(folder / "cache.json")
    assert bench("show", file, folder=folder).strip() in output
    assert "Cached" in output
    compared = bench("compare", file, file, folder=folder)
    assert "http x2, 2 rows, hits" in compared
    assert "64 equal calls at once" in compared


def test_models_that_share_by_themselves_are_measured_as_they_are(tmp_path):
    models = Repository(tmp_path / "models")
    models.root.mkdir()
    for name in ("echo", "embed"):
        models.add(WORKLOADS[name])
    found = repository.Repository.read(RepositorySettings(root=models.root))
    copied, shipped = found.model("echo").package(1), found.model("embed").package(2)
    assert copied.keeps_results
    assert copied.coalesces
    assert copied.deduplicates
    assert shipped.keeps_results
    assert models.counts(WORKLOADS["echo"])
    assert not models.counts(WORKLOADS["embed"])
    alone = found.model("echo").package(2)
    assert alone.deduplicates
    assert not alone.keeps_results
    assert not alone.coalesces
