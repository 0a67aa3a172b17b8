"""bench/locustfile.py, run by Locust itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from csv import DictReader
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferno.client import Client
from inferno.testing.processes import ROOT, command_path, wait_until


def locust(
    url: str, *options: str, until: set[str] | None = None, csv: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it without its page; five users.

    Args:
      url: of the platform.
      options: more of them.
      until: names that must have had requests before it is ended; otherwise it ends by itself.
      csv: where it then writes its statistics.
    """
    command = [command_path("locust"), "-f", "bench/locustfile.py", "--headless", "--host", url]
    command += ["-u", "5", "-r", "5", "--json", *options]
    if csv is not None:
        command += ["--csv", str(csv)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        # Locust also reads options from the environment and from files of the user.
        env={name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if until is not None and csv is not None:
                wait_until(lambda: until <= _named(csv), what=f"requests named {until}")
                process.terminate()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _named(csv: Path) -> set[str]:
    """Return the names of the requests in Locust's statistics."""
    path = csv.with_name(f"{csv.name}_stats.csv")
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        # Locust may be writing the file: a row that is not complete yet does not count.
        counts = {line["Name"]: line["Request Count"] or "" for line in DictReader(file)}
    return {name for name, count in counts.items() if count.isdigit() and int(count)}


@pytest.mark.parametrize("model", ["sentiment", "digits"])
def test_normal_and_mutated_inputs_are_answered_and_odd_ones_refused(
    platform, model, tmp_path
) -> None:
    options = ["--model-name", model, "--load-model", "--warmup", "5"]
    options += ["--verify-response", "--odd-percent", "30"]
    kinds = ("normal", "mutated", "odd")
    names = {
        *(f"predict, {kind}" for kind in kinds),
        *(f"submit, {kind}" for kind in kinds),
        # The answer to an odd submit is its end.
        *(f"result, {kind}" for kind in ("normal", "mutated")),
    }

    done = locust(platform.url, *options, until=names, csv=tmp_path / "locust")

    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert lines.keys() == names
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
            # By each of the web processes, which learn by themselves how fast the model is.
            wait_until(
                lambda: all(
                    httpx.post(f"{platform.url}/infer", json=body).status_code == 429
                    for _ in range(20)
                ),
                what="refusals",
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

    names = {"predict, normal, refused", "submit, normal, refused"}
    options += ["--mutated-percent", "0"]

    done = locust(platform.url, *options, until=names, csv=tmp_path / "locust")

    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert lines.keys() == names
    assert all(line["num_requests"] > 0 for line in lines.values())


def test_a_model_that_is_not_there_ends_it_before_the_load(platform) -> None:
    done = locust(platform.url, "--model-name", "no-such-model", "--run-time", "60s")

    assert done.returncode == 1
    assert "404" in done.stderr
    assert json.loads(done.stdout) == []
