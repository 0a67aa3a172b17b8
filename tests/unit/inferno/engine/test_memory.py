"""How much memory engines hold, and that they release it."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from inferno.engine.engine import Engine
from inferno.engine.memory import layers_that_fit
from inferno.repository.package import Package
from inferno.settings import BatchingSettings, InferenceSettings
from tests.unit.inferno.conftest import WritePackage

GB, MB = 10**9, 10**6

#: Rows and columns of the models' only matrix, which has 16 MB.
WIDTH = 2048
SIGNATURE = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", WIDTH]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", WIDTH]}],
}
WEIGHTS_BYTES = 4 * WIDTH * WIDTH

MODULE = f"""
import torch

def build(context):
    return Dense()

class Dense(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear({WIDTH}, {WIDTH}, bias=False)
        self.itself = [self]   # only the garbage collector frees such a module

    def forward(self, x):
        return self.dense(x)
"""
CALLABLE = f"""
import numpy as np

def build(context):
    weights = np.ones(({WIDTH}, {WIDTH}), np.float32)
    return lambda inputs: {{"y": inputs["x"] @ weights}}
"""


def write(write_package: WritePackage, kind: str, tmp_path: Path) -> Path:
    """Write a package of a model with one matrix."""
    if kind in ("module", "callable"):
        source = MODULE if kind == "module" else CALLABLE
        return write_package(kind, files={"model.py": source}, signature=SIGNATURE)
    if kind == "torchscript":
        file, path = "model.ts", tmp_path / "model.ts"
        torch.jit.save(torch.jit.script(torch.nn.Linear(WIDTH, WIDTH, bias=False)), path)
        content = path.read_bytes()
    else:
        file = "model.onnx"
        shape: list[str | int | None] = ["batch", WIDTH]
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "dense",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(np.ones((WIDTH, WIDTH), np.float32), "w")],
        )
        opset = [helper.make_opsetid("", 17)]
        content = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return write_package(
        kind, format=kind, entrypoint=None, files={file: content}, signature=SIGNATURE
    )


KINDS = ["onnx", "torchscript", "module", "callable"]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

#: Loads and unloads engines, with the objects of the start frozen as in a worker.
CYCLE = """
import gc, sys
from pathlib import Path
from inferno.engine import memory
from inferno.engine.engine import Engine
from inferno.repository.package import Package
from inferno.settings import BatchingSettings, InferenceSettings

batching = BatchingSettings(max_batch_size=4)
inference = InferenceSettings(device="cpu", threads=1)
for folder in sys.argv[1:]:
    package = Package.read(Path(folder))
    for n in range(23):
        engine = Engine(package, batching, inference)
        engine.forward([engine.prepare(engine.sample())] * 4)
        if n == 2:
            gc.freeze()
        engine.close()
        if n >= 2:
            print(memory.resident_bytes())
    print(sum(name.startswith("inferno_package_") for name in sys.modules))
"""


def test_loading_and_unloading_twenty_times_takes_no_more_memory(
    write_package: WritePackage, tmp_path: Path
) -> None:
    folders = [write(write_package, kind, tmp_path) for kind in KINDS]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CYCLE, *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = list(map(int, done.stdout.split()))
    assert len(printed) == 22 * len(KINDS)
    for place, kind in enumerate(KINDS):
        *resident, modules = printed[22 * place : 22 * (place + 1)]
        # Twenty leaked engines would hold 320 MB; even one is too many.
        assert max(resident) - resident[0] < WEIGHTS_BYTES, kind
        assert modules == 0, kind


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_says_what_it_holds(
    write_package: WritePackage, kind: str, tmp_path: Path
) -> None:
    package = Package.read(write(write_package, kind, tmp_path))
    engine = Engine(
        package, BatchingSettings(max_batch_size=4), InferenceSettings(device="cpu", threads=1)
    )
    engine.warm_up()
    # ONNX Runtime holds a second, packed copy of the matrix.
    assert 0.9 * WEIGHTS_BYTES < engine.memory_bytes < 6 * WEIGHTS_BYTES


@pytest.mark.parametrize(("kind", "collects"), [("callable", False), ("module", True)])
def test_all_is_looked_through_only_for_an_engine_that_refers_to_itself(
    write_package: WritePackage, kind: str, collects: bool, tmp_path: Path
) -> None:
    package = Package.read(write(write_package, kind, tmp_path))
    engine = Engine(
        package, BatchingSettings(max_batch_size=4), InferenceSettings(device="cpu", threads=1)
    )
    engine.warm_up()
    collected = []
    gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
    try:
        engine.close()
    finally:
        gc.callbacks.pop()
    assert (2 in collected) is collects


def test_what_a_package_has_opened_is_closed_with_its_engine(
    package: Callable[..., Package], tmp_path: Path
) -> None:
    source = """
class Model:
    def __init__(self, context):
        self.path = context.parameters["path"]

    def __call__(self, inputs):
        return {"y": inputs["x"]}

    def close(self):
        with open(self.path, "a") as file:
            file.write("closed ")

def build(context):
    return Model(context)
"""
    log = tmp_path / "log"
    found = package(files={"model.py": source}, parameters={"path": str(log)})
    engine = Engine(found, BatchingSettings(), InferenceSettings(device="cpu"))
    engine.close()
    engine.close()
    assert log.read_text() == "closed "


def test_a_package_whose_code_has_changed_is_loaded_anew(write_package: WritePackage) -> None:
    source = "def build(context): return lambda inputs: {'y': inputs['x'] + 1}"
    folder = write_package(files={"model.py": source})

    def answer() -> float:
        engine = Engine(Package.read(folder), BatchingSettings(), InferenceSettings(device="cpu"))
        [found] = engine.forward([{"x": np.zeros((1, 2), np.float32)}])
        engine.close()
        return float(found["y"][0, 0])

    assert answer() == 1
    (folder / "model.py").write_text(source.replace("+ 1", "+ 10"))
    assert answer() == 10


def test_as_many_layers_go_to_a_device_as_fit_beside_the_cache() -> None:
    assert layers_that_fit(8 * GB, 300 * MB, 32, kv_cache_bytes=2 * GB) == 20
    assert layers_that_fit(8 * GB, 300 * MB, 32, kv_cache_bytes=2 * GB, safety=MB) == 19
    assert layers_that_fit(80 * GB, 300 * MB, 32, kv_cache_bytes=2 * GB) == 32
    assert layers_that_fit(1 * GB, 300 * MB, 32, kv_cache_bytes=2 * GB) == 0
    with pytest.raises(ValueError, match="layer_bytes: 0"):
        layers_that_fit(8 * GB, 0, 32)
