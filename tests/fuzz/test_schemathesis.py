"""Schemathesis tries every route of the OpenAPI document on the real platform, with all its checks.

It also follows the ids in answers to further routes: submit, ask, cancel, delete.
`schemathesis.toml` has the exceptions, each with its reason.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from inferno.testing.processes import command_path

CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.mark.parametrize(
    ("options", "least"),
    [
        pytest.param(["--phases=examples,fuzzing,stateful", "--max-examples=10"], 300, id="short"),
        pytest.param(
            ["--phases=examples,coverage,fuzzing,stateful", "--max-examples=100"],
            5_000,
            id="long",
            marks=[pytest.mark.long, pytest.mark.timeout(1800)],
        ),
    ],
)
def test_every_route_keeps_to_its_document(platform, tmp_path, options, least):
    done = subprocess.run(
        [
            command_path("st"),
            f"--config-file={CONFIG}",
            "run",
            f"{platform.url}/openapi.json",
            "--seed=1",
            "--request-timeout=10",
            "--continue-on-failure",
            "--suppress-health-check=all",
            "--no-color",
            *options,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-20_000:], done.stderr[-2000:])
    assert done.returncode == 0
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1]) >= least
    # The routes that follow from others were reached, too.
    assert re.search(r"API Links: +[1-9]\d* covered", done.stdout)
