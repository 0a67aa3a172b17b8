"""The model's notes, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.conductor import Kill
from tests.chaos.ledger import Fate, Ledger, Way
from tests.chaos.passes import Passes
from tests.chaos.schedule import Fault, Stage, plan


@pytest.fixture
def passes(tmp_path: Path):
    """Worker 1 dies at 12.0 in a pass with a and b; worker 2 runs a again, and nobody b."""
    passes = Passes(tmp_path / "passes.txt")
    (tmp_path / "passes.txt").write_text(
        "c 1 start 10.0\nc 1 end 11.0\na 1 start 11.5\nb 1 start 11.5\n"
        "a 2 start 13.5\na 2 end 14.0\nd 2 star"
    )
    passes.read()
    yield passes
    passes.close()


def test_notes_tell_what_each_process_runs_and_ran(passes):
    assert passes.running(1) == ["a", "b"]
    assert passes.running(2) == []
    assert passes.finished(1) == (11.0, ["c"])
    assert passes.finished(3) == (0.0, [])


def test_a_line_that_is_being_written_is_read_later(passes, tmp_path):
    with (tmp_path / "passes.txt").open("a") as file:
        file.write("t 15.0\n")
    passes.read()
    assert passes.running(2) == ["d"]


def test_passes_are_counted_by_task(passes):
    assert report.histogram(passes) == {1: 2, 2: 1}


def test_recovery_is_measured_from_the_kill_to_the_next_pass_elsewhere(passes):
    kill = Kill(1, 12.0, Stage.FORWARD, Stage.FORWARD, None, ("a", "b"))
    assert report.recovery([kill], passes) == report.Recovery(1, 1.5, 1.5, 1.5, never=1)


def test_what_ran_unseen_is_counted(passes):
    ledger = Ledger()
    unseen, unrun = ledger.submit(Way.SOCKET), ledger.submit(Way.SOCKET)
    ledger.cut([unseen, unrun])
    passes.starts[unseen].append(passes.starts["a"][0])
    assert report.runs(ledger, passes, Fate.UNKNOWN) == 1
    assert report.runs(ledger, passes, Fate.REFUSED) == 0


def test_kills_are_counted_by_the_stage_they_hit():
    hits = [(Stage.SETTLE, 3), (None, 0), (None, None), (Stage.SETTLE, None)]
    kills = [Kill(1, 0.0, Stage.SETTLE, hit, held, ()) for hit, held in hits]
    assert report.stages(kills) == {"settle": 2, "idle": 1, "unknown": 1}


def test_a_seed_gives_one_schedule():
    assert plan(600, 7) == plan(600, 7) != plan(600, 8)
    assert {action.fault for action in plan(600, 7)} == set(Fault)
    only = plan(600, 7, faults=[Fault.SIGSTOP])
    assert {action.fault for action in only} == {Fault.SIGSTOP}
    assert all(2 <= action.at < 598 for action in only)
