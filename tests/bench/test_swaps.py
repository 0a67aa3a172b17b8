"""One small run of `python -m bench swaps`: nobody notices that the version has changed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.swaps import stale
from tests.bench.test_run import bench


@pytest.mark.long
def test_calls_go_on_while_versions_take_turns(tmp_path: Path):
    output = tmp_path / "swaps.json"
    options = ["--swaps", "2", "--rate", "20", "--before", "1", "--output", str(output)]
    printed = bench("swaps", *options, folder=tmp_path)
    document = json.loads(output.read_text())
    assert Counter(call["status"] for call in document["calls"]).keys() == {200}
    assert [load["version"] for load in document["loads"]] == [2, 1]
    assert stale(document) == 0
    assert "2 swaps" in printed
    assert f"failed calls: 0 of {len(document['calls'])}" in printed


def test_an_answer_of_the_old_version_after_a_load_is_counted():
    loads = [
        {"version": 2, "from_s": 1.0, "until_s": 2.0},
        {"version": 1, "from_s": 3.0, "until_s": 4.0},
    ]
    sent = [(1.5, 1), (2.5, 1), (2.5, 2), (2.95, 1), (3.5, 1), (3.5, 2), (4.5, 2), (4.5, 1)]
    calls = [
        {"at_s": at_s, "sent_s": at_s, "latency_ms": 100.0, "version": version}
        for at_s, version in sent
    ]
    # The one at 2.95 s still waited when the next load began.
    assert stale({"calls": calls, "loads": loads}) == 2
