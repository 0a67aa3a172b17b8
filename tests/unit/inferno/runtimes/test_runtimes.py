"""Runtimes: real artifacts made here, and the loading of packages' own code."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from inferno.engine.engine import Engine
from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository.package import Package
from inferno.runtimes import RUNTIMES
from inferno.settings import BatchingSettings, InferenceSettings
from tests.unit.inferno.conftest import WritePackage

#: Every model here computes y = 2 x + 1 on rows of any length.
SIGNATURE = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "n"]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", "n"]}],
}

CALLABLE = """
def build(context):
    return lambda inputs: {"y": inputs["x"] * 2 + 1}
"""

MODULE = """
import torch

class Affine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        assert not torch.is_grad_enabled()
        return self.dropout(x * self.weight + 1)

def build(context):
    return Affine()
"""


def onnx_bytes(*, scalar: bool = False) -> bytes:
    shape = [] if scalar else ["batch", "n"]
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "two"], ["doubled"]),
            helper.make_node("Add", ["doubled", "one"], ["y"]),
        ],
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(model)
    raw: bytes = model.SerializeToString()
    return raw


class Affine(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1


class Maybe(torch.nn.Module):
    def forward(self, a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
        if a is None:
            return b
        return a + b


class Both(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, -x


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.to(torch.bfloat16)}


def script(module: Any) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def load(package: Package) -> Engine:
    return Engine(
        package, BatchingSettings(max_batch_size=4), InferenceSettings(device="cpu", threads=1)
    )


def fields(kind: str) -> dict[str, Any]:
    """Return the arguments of `write_package` for the affine model in one format."""
    if kind == "onnx":
        return {"format": "onnx", "entrypoint": None, "files": {"model.onnx": onnx_bytes()}}
    if kind == "torchscript":
        files = {"model.ts": script(Affine())}
        return {"format": "torchscript", "entrypoint": None, "files": files}
    return {"files": {"model.py": MODULE if kind == "module" else CALLABLE}}


KINDS = ["callable", "module", "torchscript", "onnx"]
#: torch has deprecated TorchScript; it is supported nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.mark.parametrize("kind", KINDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.just(4)), min_size=1, max_size=4))
def test_every_runtime_answers_in_a_batch_as_alone(
    kind: str, sizes: list[tuple[int, int]], engines: dict[str, Engine]
) -> None:
    engine = engines[kind]
    members: list[Tensors] = [
        {"x": np.random.default_rng(i).random(size, dtype=np.float32)}
        for i, size in enumerate(sizes)
    ]
    for member, answer in zip(members, engine.forward(members), strict=True):
        assert answer["y"].dtype == np.dtype("<f4")
        np.testing.assert_allclose(answer["y"], member["x"] * 2 + 1, rtol=1e-6)
        np.testing.assert_array_equal(answer["y"], engine.forward([member])[0]["y"])


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """The affine model in every runtime."""
    loaded = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("models") / kind / "1"
        folder.mkdir(parents=True)
        manifest: dict[str, Any] = {
            "name": kind, "version": 1, "format": "python", "entrypoint": "model:build",
            "signature": SIGNATURE,
        } | fields(kind)  # fmt: skip
        files: dict[str, str | bytes] = manifest.pop("files")
        for file, content in files.items():
            raw = content.encode() if isinstance(content, str) else content
            (folder / file).write_bytes(raw)
        (folder / "model.yaml").write_text(yaml.safe_dump(manifest))
        loaded[kind] = load(Package.read(folder))
        loaded[kind].warm_up()
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_read_only_or_not_contiguous_are_taken(
    kind: str, engines: dict[str, Engine]
) -> None:
    read_only = np.frombuffer(np.ones(4, "<f4").tobytes(), "<f4").reshape(1, 4)
    transposed = np.ones((4, 3), "<f4").T
    for array in (read_only, transposed):
        assert (engines[kind].forward([{"x": array}])[0]["y"] == 3).all()


def test_a_scalar_stays_a_scalar_in_onnx(package: Callable[..., Package]) -> None:
    signature = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": []}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": []}],
    }
    files = {"model.onnx": onnx_bytes(scalar=True)}
    engine = load(package(format="onnx", entrypoint=None, files=files, signature=signature))
    assert engine.forward([{"x": np.array(2.0, "<f4")}])[0]["y"].tolist() == 5.0


# TorchScript


def torchscript(package: Callable[..., Package], module: Any, **changes: Any) -> Engine:
    files = {"model.ts": script(module)}
    manifest = {"format": "torchscript", "entrypoint": None, "signature": SIGNATURE} | changes
    return load(package(files=files, **manifest))


def test_an_optional_input_that_is_not_given_is_none(package: Callable[..., Package]) -> None:
    tensor = {"dtype": "float32", "shape": ["batch"]}
    signature = {
        "inputs": [{"name": "a", "optional": True, **tensor}, {"name": "b", **tensor}],
        "outputs": [{"name": "y", **tensor}],
    }
    engine = torchscript(package, Maybe(), signature=signature)
    one = np.ones(1, "<f4")
    assert engine.forward([{"b": one}])[0]["y"].tolist() == [1]
    assert engine.forward([{"b": one, "a": one * 2}])[0]["y"].tolist() == [3]


def test_tensors_without_names_get_the_declared_ones(package: Callable[..., Package]) -> None:
    outputs = [{"name": n, "dtype": "float32", "shape": ["batch", "n"]} for n in ("same", "minus")]
    engine = torchscript(package, Both(), signature=SIGNATURE | {"outputs": outputs})
    (answer,) = engine.forward([{"x": np.ones((1, 1), "<f4")}])
    assert {name: array.tolist() for name, array in answer.items()} == {
        "same": [[1]],
        "minus": [[-1]],
    }


def test_too_many_tensors_are_told(package: Callable[..., Package]) -> None:
    engine = torchscript(package, Both())
    with pytest.raises(ValueError, match="returned 2 tensors for the outputs y"):
        engine.forward([{"x": np.ones((1, 1), "<f4")}])


def test_named_tensors_keep_their_names_and_bfloat16_becomes_float32(
    package: Callable[..., Package],
) -> None:
    engine = torchscript(package, Named())
    assert engine.forward([{"x": np.ones((1, 2), "<f4")}])[0]["y"].tolist() == [[1, 1]]


def test_a_device_out_of_memory_is_a_memory_error(package: Callable[..., Package]) -> None:
    source = """
import torch

class Full(torch.nn.Module):
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

def build(context):
    return Full()
"""
    engine = load(package(files={"model.py": source}))
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        engine.forward([{"x": np.ones((1, 2), "<f4")}])


# Packages that cannot be loaded


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"format": "gguf"}, "format: 'gguf': expected one of onnx, torchscript, python"),
        ({"entrypoint": None}, "entrypoint: missing; format python needs `module:function`"),
        ({"entrypoint": "nowhere:build"}, "nowhere:build: FileNotFoundError"),
        ({"entrypoint": "model"}, "model: AttributeError"),
        ({"entrypoint": "model:other"}, "model:other: AttributeError"),
        ({"files": {"model.py": "def build(context): return 1"}}, "returned int, not a callable"),
        ({"files": {"model.py": "def build(context): 1 / 0"}}, "model:build: ZeroDivisionError"),
        ({"files": {"model.py": "import no_such_module"}}, "No module named 'no_such_module'"),
        ({"files": {"model.py": "def ("}}, "model:build: SyntaxError"),
        ({"format": "onnx"}, "model.onnx is missing; `inferno models prepare model` makes"),
        ({"format": "onnx", "files": {"model.onnx": "no"}}, "model.onnx: cannot be loaded"),
        ({"format": "torchscript"}, "model.ts is missing"),
        ({"format": "torchscript", "files": {"model.ts": "no"}}, "model.ts: cannot be loaded"),
        ({"format": "onnx", "artifact": "other.bin"}, "other.bin is missing"),
    ],
)
def test_a_package_that_cannot_be_loaded_says_why(
    write_package: WritePackage, changes: dict[str, Any], detail: str
) -> None:
    folder = write_package(**({"files": {"model.py": CALLABLE}} | changes))
    with pytest.raises(PackageError) as raised:
        load(Package.read(folder))
    assert raised.value.detail.startswith(str(folder))
    assert detail in raised.value.detail


# A package's own code


def answer_of(folder: Path) -> Any:
    engine = load(Package.read(folder))
    return engine.forward([{"x": np.zeros((1, 2), "<f4")}])[0]["y"].tolist()[0]


def test_two_packages_may_have_modules_of_the_same_names(write_package: WritePackage) -> None:
    # Given two models, each with a `model.py` and a `helper.py` beside it
    source = """
from .helper import VALUE

def build(context):
    return lambda inputs: {"y": inputs["x"] + VALUE}
"""
    for version in (1, 2):
        for name in "ab":
            value = version * 10 + "ab".index(name)
            files = {"model.py": source, "helper.py": f"VALUE = {value}"}
            write_package(name, version, files=files)
    folders = sorted(write_package("last", 1, files={}).parents[1].glob("[ab]/*"))
    # Then each sees its own helper
    assert [answer_of(folder)[0] for folder in folders] == [10, 20, 11, 21]


def test_a_sibling_is_not_found_by_an_absolute_import(write_package: WritePackage) -> None:
    # Absolute names belong to the process: a second package would get the first one's `helper`.
    files = {"model.py": "import helper_of_a_package", "helper_of_a_package.py": ""}
    with pytest.raises(PackageError, match="No module named 'helper_of_a_package'"):
        load(Package.read(write_package(files=files)))
    assert "helper_of_a_package" not in sys.modules


def test_versions_may_share_code_beside_their_folders(write_package: WritePackage) -> None:
    folder = write_package(entrypoint="../shared:build")
    (folder.parent / "shared.py").write_text(CALLABLE)
    assert answer_of(folder) == [1, 1]


def test_a_module_that_failed_is_loaded_anew(write_package: WritePackage) -> None:
    folder = write_package(files={"model.py": "1 / 0"})
    with pytest.raises(PackageError, match="ZeroDivisionError"):
        load(Package.read(folder))
    (folder / "model.py").write_text(CALLABLE)
    assert answer_of(folder) == [1, 1]


def test_an_artifact_may_have_a_processor(package: Callable[..., Package]) -> None:
    processor = """
class Processor:
    def preprocess(self, inputs):
        return {"x": inputs["text"].astype("f4")[:, None]}

    def postprocess(self, outputs):
        return {"y": outputs["y"][:, 0]}

def build(context):
    return Processor()
"""
    signature = {
        "inputs": [{"name": "text", "dtype": "string", "shape": ["batch"]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
    }
    files = {"model.onnx": onnx_bytes(), "processor.py": processor}
    engine = load(
        package(
            format="onnx",
            entrypoint=None,
            processor="processor:build",
            files=files,
            signature=signature,
        )
    )
    prepared = engine.prepare({"text": np.array(["1", "2"], dtype=object)})
    assert engine.forward([prepared])[0]["y"].tolist() == [3, 5]


# Imports


LOAD = """
import sys
from pathlib import Path
from inferno.engine.engine import Engine
from inferno.repository.package import Package
from inferno.settings import BatchingSettings, InferenceSettings
Engine(
    Package.read(Path(sys.argv[1])), BatchingSettings(), InferenceSettings(device="cpu")
).warm_up()
print(sorted({"torch", "onnxruntime"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("kind", "imported"),
    [("onnx", "['onnxruntime']"), ("callable", "[]"), ("torchscript", "['torch']")],
)
def test_a_worker_imports_only_what_its_model_needs(
    write_package: WritePackage, kind: str, imported: str
) -> None:
    folder = write_package(signature=SIGNATURE, **fields(kind))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == imported, done.stderr


def test_every_format_names_a_module_of_the_runtimes() -> None:
    assert set(RUNTIMES) == {"onnx", "torchscript", "python", "transformers"}
    assert all(place.startswith("inferno.runtimes.") for place in RUNTIMES.values())
