"""The commands for tasks, dead letters and lanes, against a scripted platform."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from inferno.cli.main import main
from inferno.errors import NotConfirmed, NotSupported, PayloadGone, TaskNotFound, WrongState
from tests.integration.client.test_client import ScriptedPlatform, platform  # noqa: F401

Invoke = Callable[..., Result]

ID = "0d4c7b1e-0000-4000-8000-00000000000"
TASKS = [
    {
        "task_id": f"{ID}{n}",
        "model": "echo",
        "version": n or None,
        "status": status,
        "attempts": n,
        "accepted_at": "2026-05-04T12:00:00.000+00:00",
        "finished_at": None,
    }
    for n, status in enumerate(["queued", "failed", "cancelled"])
]
LETTER = {
    "task_id": f"{ID}9",
    "model": "echo",
    "version": 1,
    "retries": 3,
    "accepted_at": "2026-05-04T12:00:00.000+00:00",
    "died_at": "2026-05-04T12:01:00.000+00:00",
    "batch_id": "b-1",
    "error": {"code": "forward_failed", "detail": "echo failed: Transient: [not] yet"},
}
LANE = {"model": "echo", "waiting": 2, "held": 4, "delayed": 1, "paused": True}
PURGE = "POST /lanes/echo/purge?confirm=3"
COUNT = "GET /dead?limit=1"


@pytest.fixture
def invoke(platform: ScriptedPlatform) -> Invoke:  # noqa: F811
    """Run a command against the scripted platform."""

    def invoke(*arguments: str, answer: str = "") -> Result:
        return CliRunner().invoke(main, [*arguments, "--url", platform.url], input=answer)

    return invoke


# -- Tasks


def test_tasks_are_listed_one_a_line(platform, invoke) -> None:  # noqa: F811
    path = "GET /tasks?limit=100&status=queued%2Cfailed&model=echo"
    platform.answers = {path: {"tasks": TASKS, "next": None}}
    chosen = ["--status", "queued", "--status", "failed", "--model", "echo"]

    lines = invoke("tasks", "list", *chosen, "--limit", "2").stdout.splitlines()

    rows = [line.split() for line in lines if line.strip().startswith(ID)]
    assert [row[:-2] for row in rows] == [
        [f"{ID}0", "echo", "queued", "0"],
        [f"{ID}1", "echo", "v1", "failed", "1"],
    ]
    as_json = invoke("tasks", "list", *chosen, "--json").stdout
    assert [json.loads(line) for line in as_json.splitlines()] == TASKS


def test_no_tasks_is_said(platform, invoke) -> None:  # noqa: F811
    platform.answers = {"GET /tasks?limit=100": {"tasks": [], "next": None}}

    assert invoke("tasks", "list").stdout == "No tasks.\n"


def test_task_is_shown_with_its_error(platform, invoke) -> None:  # noqa: F811
    for text in ("poison", "fine"):
        invoke("submit", "echo", text)

    failed, fine = (
        invoke("tasks", "show", "task-0").stdout,
        invoke("tasks", "show", "task-1").stdout,
    )

    assert "status    failed\n" in failed
    assert "error     forward_failed: poisoned\n" in failed
    assert "inferno watch task-1" in fine
    view = json.loads(invoke("tasks", "show", "task-1", "--json").stdout)
    assert view["outputs"]["label"]["data"] == ["good"]


def test_tasks_are_cancelled_until_one_cannot_be(platform, invoke) -> None:  # noqa: F811
    platform.answers = {
        "DELETE /tasks/a": TASKS[2],
        "DELETE /tasks/b": WrongState("the task is succeeded"),
    }

    result = invoke("tasks", "cancel", "a", "b")

    assert result.exit_code == 1
    assert result.stdout == "Cancelled a.\n"
    assert result.stderr.splitlines() == [
        "Error: the task is succeeded",
        "  `inferno tasks show <task>` shows the state of a task.",
    ]


def test_task_is_retried(platform, invoke) -> None:  # noqa: F811
    platform.answers = {
        "POST /tasks/a/retry": {"task_id": "b"},
        "POST /tasks/c/retry": PayloadGone("it was deleted"),
    }

    assert invoke("tasks", "retry", "a").stdout == "b\n"
    assert "Submit the task again" in invoke("tasks", "retry", "c").stderr


# -- Dead letters


def test_dead_letters_are_listed_one_a_line(platform, invoke) -> None:  # noqa: F811
    platform.answers = {
        "GET /dead?limit=100": {"dead": [LETTER], "next": None},
        COUNT: {"dead": [], "count": 7, "next": "x"},
    }

    lines = invoke("dead", "list").stdout.splitlines()

    (row,) = [line.strip() for line in lines if line.strip().startswith(ID)]
    assert row.split()[:3] == [LETTER["task_id"], "echo", "v1"]
    assert row.endswith("  3         echo failed: Transient: [not] yet")
    assert "7 in total." in lines
    assert json.loads(invoke("dead", "list", "--json").stdout) == LETTER


def test_dead_letter_is_shown_whole(platform, invoke) -> None:  # noqa: F811
    letter = LETTER | {"traceback": "Traceback:\n  [here]\n", "payload": {"inputs": {"text": "a"}}}
    platform.answers = {
        "GET /dead/a": letter,
        "GET /dead/b": TaskNotFound("no dead letter has the id 'b'"),
    }

    shown = invoke("dead", "show", "a").stdout

    assert "error     forward_failed: echo failed: Transient: [not] yet\n" in shown
    assert "batch     b-1\n" in shown
    assert "\nTraceback:\n  [here]\n" in shown
    assert '{"inputs": {"text": "a"}}' in shown
    assert json.loads(invoke("dead", "show", "a", "--json").stdout) == letter
    missing = invoke("dead", "show", "b")
    assert missing.exit_code == 1
    assert "inferno dead list" in missing.stderr


def test_dead_letters_are_replayed(platform, invoke) -> None:  # noqa: F811
    tasks = [{"task_id": "n1", "replay_of": "o1"}, {"task_id": "n2", "replay_of": "o2"}]
    platform.answers = {
        "POST /dead/a/replay": {"task_id": "b"},
        "POST /dead/replay": {"replayed": 2, "left": 1, "tasks": tasks},
        "POST /dead/replay?model=echo": {"replayed": 2, "left": 0, "tasks": tasks},
    }

    assert invoke("dead", "replay", "a").stdout == "b\n"
    assert invoke("dead", "replay", "--model", "echo").stdout == "n1\nn2\n"
    partly = invoke("dead", "replay", "--all")
    assert (partly.exit_code, partly.stdout) == (1, "n1\nn2\n")
    assert "1 could not be replayed" in partly.stderr


def test_dead_letters_are_discarded(platform, invoke) -> None:  # noqa: F811
    platform.answers = {
        "DELETE /dead/a": {"discarded": 1},
        COUNT: {"dead": [], "count": 2, "next": None},
        "DELETE /dead?confirm=2": {"discarded": 2},
    }

    assert invoke("dead", "discard", "a").stdout == "Discarded a.\n"
    refused = invoke("dead", "discard", "--all", answer="n\n")
    assert refused.exit_code == 1
    assert "Discard 2 dead letters?" in refused.stdout
    assert "DELETE /dead?confirm=2" not in platform.calls
    agreed = invoke("dead", "discard", "--all", answer="y\n")
    assert agreed.stdout.endswith("Discarded 2 dead letters.\n")
    assert invoke("dead", "discard", "--all", "--yes").stdout == "Discarded 2 dead letters.\n"


@pytest.mark.parametrize("command", ["replay", "discard"])
@pytest.mark.parametrize("arguments", [[], ["a", "--all"]])
def test_which_dead_letters_must_be_said_once(invoke, command, arguments) -> None:
    result = invoke("dead", command, *arguments)

    assert result.exit_code == 2
    assert "give the ids of tasks, or --all" in result.stderr


# -- Lanes


def test_lanes_are_listed(platform, invoke) -> None:  # noqa: F811
    other = LANE | {"model": "other", "paused": False}
    platform.answers = {"GET /lanes": {"lanes": [LANE, other]}}

    rows = [line.split() for line in invoke("lanes", "list").stdout.splitlines()]

    assert ["echo", "2", "4", "1", "paused"] in rows
    assert ["other", "2", "4", "1"] in rows
    assert json.loads(invoke("lanes", "list", "--json").stdout.splitlines()[0]) == LANE


def test_lane_is_paused_and_resumed(platform, invoke) -> None:  # noqa: F811
    platform.answers = {"POST /lanes/echo/pause": LANE, "POST /lanes/echo/resume": LANE}

    assert "inferno lanes resume echo" in invoke("lanes", "pause", "echo").stdout
    assert invoke("lanes", "resume", "echo").stdout == "Resumed echo.\n"
    assert platform.calls == list(platform.answers)


def test_purge_asks_with_the_number_of_tasks(platform, invoke) -> None:  # noqa: F811
    platform.answers = {"GET /lanes/echo": LANE, PURGE: {"model": "echo", "cancelled": 3}}

    refused = invoke("lanes", "purge", "echo", answer="n\n")
    assert refused.exit_code == 1
    assert "Cancel 3 tasks of echo?" in refused.stdout
    assert platform.calls == ["GET /lanes/echo"]
    assert invoke("lanes", "purge", "echo", answer="y\n").stdout.endswith("Cancelled 3 tasks.\n")
    assert invoke("lanes", "purge", "echo", "--yes").stdout == "Cancelled 3 tasks.\n"


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (NotConfirmed("4 tasks of echo would be cancelled", "confirm"), "inferno lanes pause"),
        (NotSupported("this needs lanes on Redis Streams"), "INFERNO_BROKER__URL"),
    ],
)
def test_refused_purge_says_what_to_do(platform, invoke, error, hint) -> None:  # noqa: F811
    platform.answers = {"GET /lanes/echo": LANE, PURGE: error}

    result = invoke("lanes", "purge", "echo", "--yes")

    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first == f"Error: {error}"
    assert hint in second
