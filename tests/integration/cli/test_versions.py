"""The commands for versions, against a scripted platform."""

from __future__ import annotations

import json

import pytest

from inferno.errors import LoadFailed
from tests.integration.cli.test_operations import invoke  # noqa: F401
from tests.integration.client.test_client import platform  # noqa: F401

WORKERS = [
    {
        "worker": "echo-1@host",
        "device": "cpu",
        "version": 2,
        "state": "ready",
        "digest": "0123456789abcdef",
        "load_s": 0.51,
    },
    {
        "worker": "echo-2@host",
        "device": "cpu",
        "version": 2,
        "state": "failed",
        "error": "no [such] file",
    },
]
ACTIVE = {
    "name": "echo",
    "version": 2,
    "loaded": True,
    "shares": {"1": 0.25, "2": 0.75},
    "follows_latest": False,
}


def test_who_has_what_is_one_line_each(platform, invoke):  # noqa: F811
    platform.workers = WORKERS
    platform.answers = {"GET /v1/models/echo/active": ACTIVE}
    shown = invoke("versions", "list", "echo")
    assert shown.exit_code == 0, shown.output
    assert "75 %" in shown.output
    assert "0123456789abcdef" in shown.output
    assert "no [such] file" in shown.output
    lines = invoke("versions", "list", "echo", "--json").output.splitlines()
    assert [json.loads(line) for line in lines] == WORKERS


def test_a_version_is_loaded_and_answers(platform, invoke):  # noqa: F811
    platform.answers = {
        "POST /v1/models:load": {"name": "echo", "version": 2, "active": 2, "workers": WORKERS[:1]}
    }
    shown = invoke("versions", "load", "echo", "2")
    assert "echo-1@host loaded version 2 in 0.5 s" in shown.output
    assert "Requests to echo go to version 2." in shown.output
    invoke("versions", "load", "echo", "--no-activate")
    assert platform.scripts == [
        {"name": "echo", "version": 2, "activate": True},
        {"name": "echo", "version": "latest", "activate": False},
    ]


def test_what_could_not_be_loaded_is_told_in_one_line(platform, invoke):  # noqa: F811
    error = LoadFailed("echo-2@host cannot load echo version 2: corrupt", "version")
    platform.answers = {"POST /v1/models:load": error}
    shown = invoke("versions", "load", "echo", "2")
    assert shown.exit_code == 1
    assert "echo-2@host cannot load echo version 2: corrupt" in shown.output


@pytest.mark.parametrize(
    ("shares", "body"),
    [
        (["2"], {"version": 2}),
        (["latest"], {"version": "latest"}),
        (["1=1", "2=3.5"], {"weights": {"1": 1.0, "2": 3.5}}),
    ],
)
def test_versions_are_chosen(platform, invoke, shares, body):  # noqa: F811
    platform.answers = {"PUT /v1/models/echo/active": ACTIVE}
    shown = invoke("versions", "activate", "echo", *shares)
    assert "Requests to echo go to version 1: 25 %, version 2: 75 %." in shown.output
    assert platform.scripts == [body]


def test_a_share_that_is_none_is_refused(platform, invoke):  # noqa: F811
    shown = invoke("versions", "activate", "echo", "1=many")
    assert shown.exit_code == 2
    assert "expected a version, latest, or VERSION=WEIGHT" in shown.output
    assert platform.calls == []


def test_a_model_is_unloaded(platform, invoke):  # noqa: F811
    platform.answers = {"POST /v1/models:unload": {"unloaded": True}}
    shown = invoke("versions", "unload", "echo")
    assert "Unloaded echo; `inferno versions load echo` brings it back." in shown.output
    assert platform.scripts == [{"name": "echo", "version": None}]
