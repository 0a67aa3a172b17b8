"""Which values a hosted model takes from its package, and which from the settings."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from inferno.engine.cores import Cores
from inferno.engine.engine import Engine
from inferno.repository.package import Package
from inferno.repository.repository import Model
from inferno.settings import Settings
from tests.unit.inferno.onnx_files import linear
from workers.hosting.loading import Loader
from workers.hosting.model import HostedModel

X = {"name": "x", "dtype": "float32", "shape": ["batch"]}


def hosted(folder: Path, batching: Mapping[str, object], **defaults: object) -> HostedModel:
    path = folder / "m" / "1"
    path.mkdir(parents=True)
    manifest = {
        "name": "m",
        "version": 1,
        "format": "python",
        "signature": {"inputs": [X], "outputs": [X | {"name": "y"}]},
        "batching": dict(batching),
    }
    (path / "model.yaml").write_text(yaml.safe_dump(manifest))
    settings = Settings()
    given = settings.model_copy(update={"batching": settings.batching.model_copy(update=defaults)})
    return HostedModel(
        Model("m", {1: Package.read(path)}, 1),
        given,
        Loader(given, Cores(()), pytest.fail),
    )


@pytest.mark.parametrize(
    ("own", "default", "objective_s"),
    [(None, None, None), (None, 80.0, 0.08), (50, None, 0.05), (50, 80.0, 0.05)],
)
def test_the_objective_of_a_model_goes_before_that_of_the_settings(
    tmp_path: Path, own: float | None, default: float | None, objective_s: float | None
) -> None:
    batching = {} if own is None else {"slo_p95_ms": own}
    assert hosted(tmp_path, batching, slo_p95_ms=default).objective_s == objective_s


def test_the_largest_declared_batch_decides_how_much_is_fetched(tmp_path: Path) -> None:
    model = hosted(tmp_path, {"batch_sizes": [1, 4, 12]})
    assert model.max_batch_size == 12
    assert model.prefetch == 36


PRIORITY = """
import os
import threading

class Processor:
    def __init__(self):
        self.priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def postprocess(self, outputs):
        return {"y": outputs["y"] * 0 + self.priority}

def build(context):
    return Processor()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
@pytest.mark.parametrize(("threads", "lowered"), [(1, 10), (2, 0)])
def test_what_is_loaded_beside_a_version_that_answers_gives_way_to_it(
    tmp_path: Path, threads: int, lowered: int
) -> None:
    packages = {}
    for version in (1, 2):
        path = tmp_path / "m" / str(version)
        path.mkdir(parents=True)
        linear(path / "model.onnx")
        (path / "model.py").write_text(PRIORITY)
        manifest = {
            "name": "m",
            "version": version,
            "format": "onnx",
            "processor": "model:build",
            "signature": {
                "inputs": [X | {"shape": ["batch", 4]}],
                "outputs": [X | {"name": "y", "shape": ["batch", 3]}],
            },
            "inference": {"threads": threads},
        }
        (path / "model.yaml").write_text(yaml.safe_dump(manifest))
        packages[version] = Package.read(path)
    settings = Settings()
    loader = Loader(settings, Cores(()), pytest.fail)
    model = HostedModel(Model("m", packages, 1), settings, loader)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    x = np.zeros((1, 4), np.float32)
    for version, expected in ((1, own), (2, own + lowered)):
        engine = model.engine(version)
        assert isinstance(engine, Engine)
        [answer] = engine.forward([engine.prepare({"x": x})])
        assert answer["y"].tolist() == [[expected] * 3], version
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
