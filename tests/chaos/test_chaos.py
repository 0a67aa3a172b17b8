"""A short run of every fault: nothing that was accepted is lost, or answered twice or wrongly."""

from __future__ import annotations

from tests.chaos.run import Options, run


def test_nothing_accepted_is_lost_while_parts_are_killed(tmp_path):
    options = Options(
        seconds=15, rate=100, seed=13, gap_s=(0.8, 1.6), pause_s=(0.5, 2.0), patience_s=20
    )
    report = run(options, tmp_path, print)
    print(report.table())
    assert report.lost == []
    assert report.duplicates == []
    assert report.wrong == []
    assert report.unpushed == []
    assert report.answered == report.accepted > 0
