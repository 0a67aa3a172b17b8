"""Devices and precisions: requested by settings and packages, and actually used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from inferno.engine.engine import Engine
from inferno.errors import PackageError
from inferno.protocol.tensors import Array
from inferno.repository.package import Package
from inferno.runtimes.modules import ModuleRunner
from inferno.runtimes.onnx import CPU, choose_providers, halve
from inferno.settings import BatchingSettings, InferenceSettings

ReadPackage = Callable[..., Package]

WIDTH = 64
SIGNATURE = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", WIDTH]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", WIDTH]}],
}

#: A dense layer with random weights from a fixed seed.
LINEAR = f"""
import torch

class Dense(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear({WIDTH}, {WIDTH}, bias=False)
        generator = torch.Generator().manual_seed(0)
        self.dense.weight.data.normal_(generator=generator)

    def forward(self, x):
        return self.dense(x)

def build(context):
    return Dense()
"""


def weights() -> Array:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(WIDTH, WIDTH).normal_(generator=generator).numpy()


def onnx_bytes() -> bytes:
    shape: list[str | int | None] = ["batch", WIDTH]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights().T.copy(), "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    raw: bytes = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return raw


def load(package: Package, **inference: Any) -> Engine:
    settings = InferenceSettings(**({"device": "cpu", "threads": 1} | inference))
    engine = Engine(package, BatchingSettings(max_batch_size=4), settings)
    engine.warm_up()
    return engine


def onnx_package(package: ReadPackage, **fields: Any) -> Package:
    files = {"model.onnx": onnx_bytes()}
    return package(format="onnx", entrypoint=None, files=files, signature=SIGNATURE, **fields)


def module_package(package: ReadPackage, source: str = LINEAR, **fields: Any) -> Package:
    return package(files={"model.py": source}, signature=SIGNATURE, **fields)


def error_of(engine: Engine) -> float:
    """Return the largest error of a pass, relative to the largest value."""
    x = np.random.default_rng(0).standard_normal((4, WIDTH), np.float32)
    expected = x @ weights().T
    [answer] = engine.forward([{"x": x}])
    return float(abs(answer["y"] - expected).max() / abs(expected).max())


# Precision


@pytest.mark.parametrize(
    ("make", "quantize", "least", "most"),
    [
        (onnx_package, "none", 0, 1e-6),
        (onnx_package, "int8", 1e-4, 0.05),
        (module_package, "none", 0, 1e-6),
        (module_package, "int8", 1e-4, 0.05),
        (module_package, "bf16", 1e-4, 0.02),
    ],
)
def test_a_model_computes_in_the_precision_that_is_asked_for(
    package: ReadPackage, make: Callable[..., Package], quantize: str, least: float, most: float
) -> None:
    assert least <= error_of(load(make(package), quantize=quantize)) <= most


def test_the_package_goes_before_the_settings(package: ReadPackage) -> None:
    said = {"quantize": "none", "threads": 2, "compile": False, "device": "cpu"}
    found = onnx_package(package, inference=said)
    asked = InferenceSettings(quantize="int8", compile=True, device="cuda", threads=1)
    merged = found.inference(asked)
    assert {name: getattr(merged, name) for name in said} == said
    assert error_of(load(found, quantize="int8")) <= 1e-6


@pytest.mark.parametrize(
    ("make", "quantize", "reason"),
    [
        (onnx_package, "bf16", "ONNX models cannot use bf16; use fp16 or int8"),
        (onnx_package, "fp16", "fp16 is slower than fp32 on the CPU"),
        (module_package, "fp16", "fp16 is for CUDA; on the CPU, use bf16 or int8"),
    ],
)
def test_what_cannot_be_is_an_error_of_the_package_and_a_warning_of_the_settings(
    package: ReadPackage,
    caplog: pytest.LogCaptureFixture,
    make: Callable[..., Package],
    quantize: str,
    reason: str,
) -> None:
    assert error_of(load(make(package), quantize=quantize)) <= 1e-6
    assert reason in caplog.text
    with pytest.raises(PackageError, match=reason):
        load(make(package, name="strict", inference={"quantize": quantize}))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_module_runs_in_bfloat16_and_not_in_int8(
    package: ReadPackage, tmp_path: Path
) -> None:
    module = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    module.weight.data = torch.from_numpy(weights())
    torch.jit.save(torch.jit.script(module), tmp_path / "model.ts")
    files = {"model.ts": (tmp_path / "model.ts").read_bytes()}
    fields = {"format": "torchscript", "entrypoint": None, "files": files, "signature": SIGNATURE}

    assert 1e-4 <= error_of(load(package(**fields), quantize="bf16")) <= 0.02
    with pytest.raises(PackageError, match="a TorchScript module cannot be made int8; use bf16"):
        load(package("strict", inference={"quantize": "int8"}, **fields))


def test_python_without_a_module_stays_as_it_is(
    package: ReadPackage, caplog: pytest.LogCaptureFixture
) -> None:
    source = "def build(context): return lambda inputs: {'y': inputs['x']}"
    load(module_package(package, source), quantize="int8")
    assert "only a torch module can be loaded in another precision" in caplog.text


def test_a_halved_graph_takes_and_gives_float32(tmp_path: Path) -> None:
    # Given the precision of a GPU; the CPU can run it, too, but slowly
    source = tmp_path / "model.onnx"
    source.write_bytes(onnx_bytes())
    halved = halve(source, tmp_path)
    [kept] = onnx.load(halved).graph.initializer
    assert kept.data_type == TensorProto.FLOAT16
    x = np.ones((1, WIDTH), np.float32)
    [y] = onnxruntime.InferenceSession(halved, providers=[CPU]).run(None, {"x": x})
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x @ weights().T, atol=0.05)


# Devices, providers and threads


def test_providers_come_from_the_device_unless_they_are_named(package: ReadPackage) -> None:
    found = onnx_package(package)
    engine = load(found)
    assert engine._runtime._session.get_providers() == [CPU]  # type: ignore[attr-defined]
    named = InferenceSettings(onnx_providers=f" {CPU} ,")
    assert named.onnx_providers == (CPU,)
    with pytest.raises(PackageError, match="ONNX_PROVIDERS: Nope: the installed onnxruntime has"):
        load(found, onnx_providers=("Nope", CPU))


def test_a_device_without_its_provider_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from inferno.runtimes import ModelContext

    context = ModelContext(Path("models/x/1"), "cuda", 1, {}, ())
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert choose_providers(context) == ["CUDAExecutionProvider", CPU]
    else:
        assert choose_providers(context) == [CPU]
        assert "models/x/1 runs on the CPU: the installed onnxruntime" in caplog.text


THREADS = """
import torch

class Asked(torch.nn.Module):
    def forward(self, x):
        return x * 0 + torch.get_num_threads()

def build(context):
    return Asked()
"""


def test_models_of_one_process_keep_their_own_numbers_of_threads(package: ReadPackage) -> None:
    # Given two models that are loaded one after the other
    engines = [
        load(module_package(package, THREADS, name=f"model{n}", inference={"threads": n}))
        for n in (1, 2)
    ]
    # When executors run both in turns, at the same time
    member = {"x": np.zeros((1, WIDTH), np.float32)}
    together = Barrier(2)

    def run(order: list[int]) -> list[float]:
        found = []
        for place in order:
            together.wait(10)
            found.append(engines[place].forward([member])[0]["y"][0, 0].item())
        return found

    # Then each pass has the number of threads of its model
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [[0, 1, 0], [1, 0, 1]])) == [[1, 2, 1], [2, 1, 2]]


# torch.compile


def test_a_module_is_compiled_when_it_is_asked_for(
    package: ReadPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a backend that records each graph; Inductor would take half a minute
    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(ModuleRunner, "BACKEND", staticmethod(backend))
    found = module_package(package)
    load(found)
    assert not compiled
    assert error_of(load(found, compile=True)) <= 1e-6
    assert compiled


def test_a_module_that_cannot_be_compiled_runs_without(
    package: ReadPackage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(graph: Any, example: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(ModuleRunner, "BACKEND", staticmethod(backend))
    with caplog.at_level(logging.WARNING):
        engine = load(module_package(package), compile=True)
    assert error_of(engine) <= 1e-6
    assert caplog.text.count("runs without torch.compile, which failed") == 1
    assert "no compiler on this machine" in caplog.text


def test_an_error_of_a_compiled_module_stays_its_own(
    package: ReadPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModuleRunner, "BACKEND", "eager")
    engine = load(module_package(package), compile=True)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        engine.forward([{"x": np.zeros((1, 3), np.float32)}])
    assert engine._runtime._runner._compiled is not None  # type: ignore[attr-defined]


def test_an_environment_variable_names_the_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    from inferno.settings import load as settings

    monkeypatch.setitem(os.environ, "INFERNO_INFERENCE__ONNX_PROVIDERS", f"X,{CPU}")
    assert settings().inference.onnx_providers == ("X", CPU)
