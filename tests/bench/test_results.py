"""Medians, files and comparisons of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import report
from bench.results import Failure, Measurement, Results, summarise

MACHINE = {
    "at": "2026-05-04T12:00:00+00:00", "commit": "abc1234", "modified": False, "cpu": "A CPU",
    "cores": 2, "memory_gib": 8.0, "system": "Linux", "python": "3.11.7", "redis": "redis 7.0.15",
}  # fmt: skip


def measured(rate: float, repeat: int = 1, target: str = "inferno", **more: object) -> Measurement:
    fixed = {
        "workload": "echo", "scenario": "http x64", "seconds": 2.0,
        "latency_ms": {"p50": 10.0 * repeat, "p99": 20.0},
        "cpu_s": {"web": 1.0 * repeat, "redis": 0.5, "load": 0.25},
        "rss_bytes": {"web": 100 * 2**20}, "mean_batch": 8.0,
    }  # fmt: skip
    values = fixed | {"target": target, "repeat": repeat, "answered": round(2 * rate)} | more
    return Measurement(**values)  # type: ignore[arg-type]


def results(*measurements: Measurement) -> Results:
    return Results(dict(MACHINE), {"seconds": 2}, measurements=list(measurements))


def printed(renderable: object) -> str:
    console = Console(width=250)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_repeats_become_medians():
    (summary,) = summarise([measured(rate, n) for n, rate in enumerate((900, 1000, 1300), 1)])
    assert (summary.rate, summary.rate_range, summary.repeats) == (1000, (900, 1300), 3)
    assert summary.latency_ms == {"p50": 20.0, "p99": 20.0}
    assert summary.mean_batch == 8.0


def test_processor_time_is_for_a_thousand_answers_of_the_same_repeat():
    (summary,) = summarise([measured(500, 1), measured(1000, 2)])
    # 1 s for 1,000 answers, and 2 s for 2,000.
    assert summary.cpu_s_per_1000["web"] == 1.0
    assert summary.cpu_s_per_1000["redis"] == pytest.approx((0.5 + 0.25) / 2)


def test_targets_workloads_and_scenarios_stay_apart():
    base = measured(100)
    others = [replace(base, target="x"), replace(base, workload="x"), replace(base, scenario="x")]
    assert len(summarise([base, *others])) == 4


def test_errors_of_all_repeats_are_counted():
    bad = measured(100, 2, errors={"refused": 2, "timeout": 1}, sample="503")
    (summary,) = summarise([measured(100), bad])
    assert (summary.errors, summary.sample) == (3, "503")


def test_nothing_answered_is_no_division_by_zero():
    (summary,) = summarise([measured(0, latency_ms={}, mean_batch=None)])
    assert (summary.rate, summary.cpu_s_per_1000, summary.mean_batch) == (0, {}, None)
    assert "http x64" in printed(report.show(results(measured(0, latency_ms={}))))


def test_what_is_saved_is_read_again(tmp_path: Path):
    written = results(measured(100), measured(200, offered_rate=70.0, values={"x": 1.0}))
    written.failures.append(Failure("ray", None, "no network"))
    written.versions["flask"] = {"Flask": "3.1.3"}
    written.save(tmp_path / "folder" / "a.json")
    assert Results.read(tmp_path / "folder" / "a.json") == written


def test_a_file_of_another_schema_is_refused(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="expected schema 1"):
        Results.read(tmp_path / "a.json")


def test_tables_show_ratios_to_inferno_errors_and_what_was_not_measured():
    found = results(
        measured(1000), measured(4000, target="flask", errors={"refused": 7}, sample="500 no")
    )
    found.failures.append(Failure("ray", "echo", "it does not start"))
    text = printed(report.show(found))
    assert "1.00" in text
    assert "4.00" in text
    assert "flask had errors: 500 no" in text
    assert "ray (echo) was not measured: it does not start" in text


def test_an_open_loop_whose_generator_was_late_is_marked():
    text = printed(report.show(results(measured(1000, late_ms=80.0))))
    assert "the generator was 80 ms late for inferno" in text
    assert "late" not in printed(report.show(results(measured(1000, late_ms=2.0))))


def test_a_difference_is_clear_when_the_repeats_do_not_overlap():
    before = results(measured(100), measured(110, 2))
    (faster,) = report.differences(before, results(measured(111), measured(140, 2)))
    (same,) = report.differences(before, results(measured(105), measured(140, 2)))
    (once,) = report.differences(before, results(measured(400)))
    assert faster.is_clear
    assert faster.ratio == pytest.approx(125.5 / 105)
    assert not same.is_clear
    # One repeat tells nothing of noise.
    assert not once.is_clear


def test_only_what_both_runs_measured_is_compared():
    before = results(measured(100), measured(100, target="flask"))
    after = results(measured(200), measured(200, target="mosec"))
    assert [d.after.target for d in report.differences(before, after)] == ["inferno"]
    text = printed(report.compare(before, after))
    assert "2.00" in text
    assert "within noise" in text
    assert "flask" not in text


def test_comparing_runs_of_different_machines_says_so():
    other = results(measured(100))
    other.machine["cores"] = 64
    assert "cores differs: 2, 64" in printed(report.compare(results(measured(100)), other))
