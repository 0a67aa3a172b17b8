"""bench/locustfile.py, run by Locust itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from inferno.client import Client
from tests.processes import ROOT, bin_path, wait_until


def locust(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run it without its page; five users."""
    command = [bin_path("locust"), "-f", "bench/locustfile.py", "--headless", "--host", url]
    return subprocess.run(
        [*command, "-u", "5", "-r", "5", "--json", *options],
        cwd=ROOT,
        # Locust also reads options from the environment and from files of the user.
        env={name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("model", ["sentiment", "digits"])
def test_normal_and_mutated_inputs_are_answered_and_odd_ones_refused(platform, model) -> None:
    options = ["--run-time", "4s", "--model-name", model, "--load-model", "--warmup", "5"]

    done = locust(platform.url, *options, "--verify-response", "--odd-percent", "30")

    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    kinds = ("normal", "mutated", "odd")
    # The answer to an odd submit is its end.
    assert lines.keys() == {
        *(f"predict, {kind}" for kind in kinds),
        *(f"submit, {kind}" for kind in kinds),
        *(f"result, {kind}" for kind in ("normal", "mutated")),
    }
    assert all(line["num_requests"] > 0 for line in lines.values())
    assert all(line["num_failures"] == 0 for line in lines.values())


@pytest.fixture
def hopeless(platform) -> Iterator[dict[str, Any]]:
    """A request to a model that has too much to do to start it in time."""
    body = {"model": "mock", "inputs": {"text": "in time?"}, "timeout_ms": 1}
    with Client(platform.url) as client:
        # Without an answer its speed is not known, and nothing refused.
        client.predict("mock", "first")
        client.pause("mock")
        try:
            for n in range(100):
                client.submit("mock", f"{n}")
            wait_until(
                lambda: httpx.post(f"{platform.url}/infer", json=body).status_code == 429,
                what="a refusal",
            )
            yield body
        finally:
            lane = client.lane("mock")
            client.purge("mock", lane["waiting"] + lane["delayed"])
            client.resume("mock")


def test_a_refusal_for_too_much_load_is_no_failure(platform, hopeless, tmp_path) -> None:
    payload = tmp_path / "payload.json"
    payload.write_text(json.dumps(hopeless))
    options = ["--model-name", "mock", "--payload-file", str(payload), "--odd-percent", "0"]

    done = locust(platform.url, *options, "--mutated-percent", "0", "--run-time", "2s")

    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert lines.keys() == {"predict, normal, refused", "submit, normal, refused"}
    assert all(line["num_requests"] > 0 for line in lines.values())


def test_a_model_that_is_not_there_ends_it_before_the_load(platform) -> None:
    done = locust(platform.url, "--model-name", "no-such-model", "--run-time", "60s")

    assert done.returncode == 1
    assert "404" in done.stderr
    assert json.loads(done.stdout) == []
