"""What calls leave of an engine: one small run of the real thing, and how it is reckoned."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from bench.remainder import LoopsFailed, Turn, lines, running
from bench.workloads import WORKLOADS
from tests.bench.test_run import bench, needs_wrk


def test_what_is_left_is_what_calls_with_their_passes_fill():
    turn = Turn(
        alone=1000, beside=700, calls=600, answered=600, p99_ms=100, batch_beside=32, batch=30
    )
    # 600 calls a second take 0.3 of the machine, each as much as half a pass.
    assert turn.cost == pytest.approx(0.5 / 1000)
    assert turn.left == pytest.approx(1000 / 1.5)
    more = msgspec.structs.replace(turn, answered=500, p99_ms=120, batch=28)
    *_, last = lines([turn, more])
    assert last == (
        "Inferno answers 550 (50), in batches of 29.0 (1.0): 0.825 (0.075) of that, "
        "p99 110 (10) ms."
    )


def test_loops_without_a_model_say_what_is_missing(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("INFERNO_REPOSITORY__ROOT", str(tmp_path))
    with (
        pytest.raises(LoopsFailed, match=r"^the loops ended: .*embed"),
        running(WORKLOADS["embed"], {}),
    ):
        pass


@needs_wrk
@pytest.mark.long
def test_the_engine_is_measured_alone_beside_calls_and_through_the_platform(tmp_path: Path):
    output = tmp_path / "turns.json"
    options = ["--workload", "embed-int8", "--connections", "16", "--seconds", "2", "--turns", "1"]
    printed = bench("remainder", *options, "--output", str(output), folder=tmp_path)
    [turn] = msgspec.json.decode(output.read_bytes(), type=list[Turn])
    assert min(turn.alone, turn.beside, turn.calls, turn.answered, turn.p99_ms) > 0
    assert re.search(r"^turn 1: the loops make [\d,]+/s, and [\d,]+ beside", printed, re.MULTILINE)
    assert f"Inferno answers {turn.answered:,.0f} (nan)" in printed
