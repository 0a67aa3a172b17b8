"""The life of a task."""

import msgspec
import pytest

from inferno.protocol.tasks import TERMINAL, TRANSITIONS, BatchInfo, Result, TaskState, Timings


@pytest.mark.parametrize("state", TaskState)
def test_a_terminal_state_never_changes_and_no_other_is_a_dead_end(state: TaskState) -> None:
    assert state.terminal == (not TRANSITIONS[state]) == (state in TERMINAL)


@pytest.mark.parametrize("state", [s for s in TaskState if not s.terminal])
@pytest.mark.parametrize("end", [TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED])
def test_a_task_can_fail_expire_or_be_cancelled_at_any_time(
    state: TaskState, end: TaskState
) -> None:
    assert end in TRANSITIONS[state]


def test_only_a_running_task_succeeds_or_is_retried() -> None:
    for outcome in (TaskState.SUCCEEDED, TaskState.RETRYING):
        assert [s for s, after in TRANSITIONS.items() if outcome in after] == [TaskState.RUNNING]


def test_a_result_keeps_its_outputs_through_json() -> None:
    result = Result(
        {"y": {"data": [1.5]}},
        "embed",
        2,
        Timings(1, 2, 3, 6),
        BatchInfo("b", 4, 4, "full", 2.5, 3.0),
        "w",
    )
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
