"""Hostile input, from a seed, against the real platform: short by default, ten minutes long."""

from __future__ import annotations

import pytest

from tests.fuzz.campaign import Options, run


@pytest.mark.parametrize(
    "options",
    [
        # Other tests share the machine: the bystander may wait for longer.
        pytest.param(Options(seconds=60, cases=400, seed=1, wait_s=5), id="short"),
        pytest.param(
            Options(seconds=600, seed=2),
            id="long",
            marks=[pytest.mark.long, pytest.mark.timeout(900)],
        ),
    ],
)
def test_hostile_connections_harm_nobody(platform, options):
    report = run(platform.url, platform.popen.pid, options)
    print(report)
    assert report.cases >= 400
    assert not report.faults
    assert not report.broken()
