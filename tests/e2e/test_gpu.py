"""bench/gpu.py, in small and on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench.gpu import ResNet50
from inferno.testing.processes import ROOT


# Each model starts a platform, and torch twice.
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["embed", pytest.param("resnet50", marks=pytest.mark.long)])
def test_a_model_is_measured_alone_and_behind_the_platform(tmp_path, model) -> None:
    report = tmp_path / "gpu.json"
    options = [model, "--device", "cpu", "--seconds", "1", "--batch-size", "2", "--clients", "4"]

    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *options, "--json", str(report)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["device"] == "cpu"
    (figures,) = found["figures"]
    assert figures["model"] == model
    assert model in done.stdout
    assert figures["engine_per_s"] > 0
    assert figures["platform_per_s"] > 0
    assert 1 <= figures["mean_batch"] <= 2


def test_the_network_has_the_size_of_a_resnet_50() -> None:
    assert sum(weights.numel() for weights in ResNet50().parameters()) == 25_557_032
