"""Packages made from artifacts: what is read from them, and what is found by running them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from inferno.engine.engine import Engine
from inferno.errors import PackageError
from inferno.packaging.creation import Identity, create
from inferno.packaging.draft import Draft, parse_tensor
from inferno.packaging.reading import read
from inferno.repository.manifest import TaskType
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import BatchingSettings, InferenceSettings, RepositorySettings
from tests.unit.inferno.onnx_files import linear, model, value

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

INFERENCE = InferenceSettings(device="cpu", threads=1)
FLOAT = TensorProto.FLOAT


def make(root: Path, draft: Draft, version: int | None = None) -> Package:
    return create(root, Identity("made", version), draft, INFERENCE)


def shapes(package: Package) -> dict[str, list[int | str]]:
    specs = (*package.signature.inputs, *package.signature.outputs)
    return {spec.name: list(spec.shape) for spec in specs}


def answer(package: Package, inputs: dict[str, Any]) -> dict[str, Any]:
    engine = Engine(package, BatchingSettings(), INFERENCE)
    engine.warm_up()
    [outputs] = engine.forward([engine.prepare(inputs)])
    return outputs


# -- ONNX ------------------------------------------------------------------------------------------


def test_an_onnx_file_says_what_it_takes_and_gives(root: Path, tmp_path: Path) -> None:
    package = make(root, read(str(linear(tmp_path / "net.onnx"))))

    assert package.path == root / "made" / "1"
    assert shapes(package) == {"x": ["batch", 4], "y": ["batch", 3]}
    assert package.manifest.batching.max_batch_size is None
    given = answer(package, {"x": np.ones((2, 4), np.float32)})
    np.testing.assert_allclose(given["y"], [[1.8, 2.2, 2.6]] * 2, rtol=1e-6)


def test_versions_are_counted_and_never_overwritten(root: Path, tmp_path: Path) -> None:
    draft = read(str(linear(tmp_path / "net.onnx")))
    (root / "made" / "7").mkdir(parents=True)

    assert make(root, draft).version == 8
    with pytest.raises(PackageError, match="made/8 already exists"):
        make(root, draft, version=8)
    assert make(root, draft, version=3).version == 3


def test_a_version_appears_as_a_whole(root: Path, tmp_path: Path, monkeypatch) -> None:
    draft = read(str(linear(tmp_path / "net.onnx")))
    seen = []

    def rename(source: str, target: str) -> None:
        settings = RepositorySettings(root=root)
        seen.append((Repository.read(settings), os.listdir(source)))
        (root / "made" / "1" / "other").mkdir(parents=True)
        os.replace(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PackageError, match="already exists"):
        make(root, draft)

    ((repository, files),) = seen
    assert not repository.models
    assert not repository.errors
    assert set(files) == {"model.yaml", "model.onnx"}
    assert os.listdir(root) == ["made"]


@pytest.mark.parametrize("rows", [1, 8])
def test_a_fixed_number_of_rows_is_kept_to(root: Path, tmp_path: Path, rows: int) -> None:
    draft = read(
        str(linear(tmp_path / "net.onnx", rows, [rows, 3])), [parse_tensor("x:float32:batch,4")]
    )

    package = make(root, draft)

    assert shapes(package) == {"x": ["batch", 4], "y": ["batch", 3]}
    assert f"fixed at {rows}" in draft.notes[0]
    given = answer(package, {"x": np.ones((1, 4), np.float32)})
    np.testing.assert_allclose(given["y"], [[1.8, 2.2, 2.6]], rtol=1e-6)


def test_one_fixed_row_is_a_batch_of_one_without_being_told(root: Path, tmp_path: Path) -> None:
    package = make(root, read(str(linear(tmp_path / "net.onnx", 1, [1, 3]))))

    assert shapes(package) == {"x": ["batch", 4], "y": ["batch", 3]}
    assert package.manifest.batching.max_batch_size == 1
    assert "fixed at 1" in (package.path / "model.yaml").read_text()


def test_other_fixed_first_dimensions_are_no_batch(root: Path, tmp_path: Path) -> None:
    draft = read(str(linear(tmp_path / "net.onnx", 8, [8, 3])))

    assert shapes(make(root, draft)) == {"x": [8, 4], "y": [8, 3]}
    assert "each task needs its own forward pass" in draft.notes[0]


@pytest.mark.parametrize("out", [None, (None, None), ("unk__1", 3), ("other", "unk__2")])
def test_what_an_onnx_file_does_not_say_is_found_by_running_it(
    root: Path, tmp_path: Path, out: Any
) -> None:
    package = make(root, read(str(linear(tmp_path / "net.onnx", None, out))))

    assert shapes(package) == {"x": ["batch", 4], "y": ["batch", 3]}


def test_free_sizes_of_outputs_are_called_like_those_of_inputs(root: Path, tmp_path: Path) -> None:
    x, lengths = value("ids", TensorProto.INT64, ["n", "seq"]), value("h", FLOAT, ["n", None, 2])
    # [n, seq] -> [n, seq, 1] -> [n, seq, 2], as floats; and twice as long.
    nodes = [
        ("Unsqueeze", ["ids", "last"], "u"),
        ("Cast", ["u"], "c", {"to": FLOAT}),
        ("Concat", ["c", "c"], "h", {"axis": 2}),
        ("Concat", ["h", "h"], "long", {"axis": 1}),
    ]
    long = value("long", FLOAT, None)
    onnx.save(model(nodes, [x], [lengths, long], last=np.array([2])), tmp_path / "net.onnx")
    draft = read(str(tmp_path / "net.onnx"))

    package = make(root, draft)

    assert shapes(package) == {
        "ids": ["batch", "seq"],
        "h": ["batch", "seq", 2],
        "long": ["batch", "long_1", 2],
    }
    assert "Tasks share a pass if they agree in seq" in draft.notes[0]


def test_a_sum_over_all_rows_cannot_be_batched(root: Path, tmp_path: Path) -> None:
    x, y = value("x", FLOAT, ["batch", 4]), value("y", FLOAT, [1, 4])
    nodes = [("ReduceSum", ["x", "first"], "y")]
    onnx.save(model(nodes, [x], [y], first=np.array([0])), tmp_path / "net.onnx")
    draft = read(str(tmp_path / "net.onnx"))

    package = make(root, draft)

    assert shapes(package) == {"x": ["rows", 4], "y": [1, 4]}
    assert "The first dimension of y does not grow" in draft.notes[0]
    assert answer(package, {"x": np.ones((3, 4), np.float32)})["y"].tolist() == [[3.0] * 4]


def test_similarities_between_rows_cannot_be_batched(root: Path, tmp_path: Path) -> None:
    x, y = value("x", FLOAT, ["n", 4]), value("y", FLOAT, ["n", "n"])
    nodes = [("Transpose", ["x"], "t"), ("MatMul", ["x", "t"], "y")]
    onnx.save(model(nodes, [x], [y]), tmp_path / "net.onnx")
    draft = read(str(tmp_path / "net.onnx"))

    assert shapes(make(root, draft)) == {"x": ["n", 4], "y": ["n", "n"]}
    assert "also another dimension of y" in draft.notes[0]


def test_weights_beside_an_onnx_file_come_along(root: Path, tmp_path: Path) -> None:
    net = onnx.load(linear(tmp_path / "net.onnx"))
    onnx.save(
        net,
        tmp_path / "net.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )

    package = make(root, read(str(tmp_path / "net.onnx")))

    assert (package.path / "weights.bin").is_file()
    given = answer(package, {"x": np.ones((1, 4), np.float32)})
    np.testing.assert_allclose(given["y"], [[1.8, 2.2, 2.6]], rtol=1e-6)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(PackageError, match=r"weights are in weights.bin, which does not exist"):
        read(str(tmp_path / "net.onnx"))


def test_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    net = onnx.load(linear(tmp_path / "net.onnx"))
    weights = net.graph.initializer[0]
    weights.data_location = TensorProto.EXTERNAL
    weights.ClearField("raw_data")
    weights.external_data.add(key="location", value="../secret")
    (tmp_path / "net.onnx").write_bytes(net.SerializeToString())

    with pytest.raises(PackageError, match="expected a file in the same folder"):
        read(str(tmp_path / "net.onnx"))


def test_outputs_that_are_no_tensors_are_left_out(root: Path, tmp_path: Path) -> None:
    x, y = value("x", FLOAT, ["n", 4]), value("y", FLOAT, ["n", 4])
    listed = helper.make_tensor_sequence_value_info("list", FLOAT, None)
    nodes = [("Neg", ["x"], "y"), ("SequenceConstruct", ["x"], "list")]
    onnx.save(model(nodes, [x], [y, listed]), tmp_path / "net.onnx")
    draft = read(str(tmp_path / "net.onnx"))

    assert shapes(make(root, draft)) == {"x": ["batch", 4], "y": ["batch", 4]}
    assert "The output list is left out" in draft.notes[0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nothing.onnx", "the file does not exist"),
        ("text.onnx", "not an ONNX file"),
        ("text.pt", "not a TorchScript file"),
        ("pickled.pt", "A file from torch.save needs the model's classes"),
        ("text.bin", "expected a file of .onnx, .pt, .pth, .ts, an MLflow model's folder or"),
        (".", "a folder without the file MLmodel"),
        ("bfloat.onnx", "x has dtype BFLOAT16, which cannot be sent"),
        ("absent:build", "absent.py does not exist"),
    ],
)
def test_what_no_package_can_be_made_from_is_explained(
    tmp_path: Path, monkeypatch, source: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.onnx", "text.pt", "text.bin"):
        Path(name).write_text("text")
    torch.save(torch.nn.Linear(2, 2), "pickled.pt")
    x, y = value("x", TensorProto.BFLOAT16, ["n"]), value("y", TensorProto.BFLOAT16, ["n"])
    onnx.save(model([("Neg", ["x"], "y")], [x], [y]), "bfloat.onnx")

    with pytest.raises(PackageError, match=reason):
        read(source)


def test_owners_are_told_of_names_that_there_are_not(tmp_path: Path) -> None:
    file = linear(tmp_path / "net.onnx")

    with pytest.raises(PackageError, match="has no input z; it has x"):
        read(str(file), [parse_tensor("z:float32:batch,4")])


# -- TorchScript -----------------------------------------------------------------------------------


class Two(torch.nn.Module):
    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x.sum(1)
        return x * 2, total if bias is None else total + bias


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"double": x * 2, "long": torch.cat([x, x], 1)}


def script(folder: Path, module: torch.nn.Module) -> str:
    torch.jit.script(module).save(folder / "net.pt")
    return str(folder / "net.pt")


def test_torchscript_is_asked_for_names_and_its_owner_for_shapes(
    root: Path, tmp_path: Path
) -> None:
    file = script(tmp_path, Two())
    with pytest.raises(PackageError, match=r"forward takes x, bias, .*--input x:float32:batch,3"):
        read(file)

    given = [parse_tensor("x:float32:batch,n"), parse_tensor("bias:float32:batch")]
    package = make(root, read(file, given))

    assert shapes(package) == {
        "x": ["batch", "n"], "bias": ["batch"], "output_0": ["batch", "n"], "output_1": ["batch"],
    }  # fmt: skip
    assert package.signature.input("bias").optional
    assert answer(package, {"x": np.ones((2, 3), np.float32)})["output_1"].tolist() == [3.0, 3.0]


def test_dicts_of_torchscript_have_their_keys_for_names(root: Path, tmp_path: Path) -> None:
    draft = read(script(tmp_path, Named()), [parse_tensor("x:float32:batch,4")])

    assert shapes(make(root, draft)) == {
        "x": ["batch", 4], "double": ["batch", 4], "long": ["batch", 8],
    }  # fmt: skip


def test_a_wrong_shape_is_found_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(4, 2)).save(tmp_path / "net.pt")
    draft = read(str(tmp_path / "net.pt"), [parse_tensor("input:float32:batch,5")])

    with pytest.raises(PackageError, match=r"fails on made-up inputs \(input \[2, 5\]\)"):
        make(root, draft)
    assert os.listdir(root) == []


# -- Python ----------------------------------------------------------------------------------------

GREET = """
import numpy as np
from .words import HELLO

def build(context):
    def greet(inputs):
        texts = [f"{HELLO} {who}" for who in inputs["who"]]
        return {"greeting": np.array(texts), "lengths": np.array([[len(t)] for t in texts])}
    return greet
"""


def test_code_comes_with_the_modules_beside_it(root: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "greet.py").write_text(GREET)
    (tmp_path / "words.py").write_text("from . import deeper\nHELLO = deeper.HELLO")
    (tmp_path / "deeper.py").write_text("HELLO = 'Hello'")
    (tmp_path / "unused.py").write_text("")
    monkeypatch.chdir(tmp_path)

    draft = read("greet:build", [parse_tensor("who:string:batch")])
    package = make(root, draft)

    assert set(draft.files) == {"greet.py", "words.py", "deeper.py"}
    assert shapes(package) == {"who": ["batch"], "greeting": ["batch"], "lengths": ["batch", 1]}
    assert package.signature.output("greeting").dtype == "string"
    given = answer(package, {"who": np.array(["Ada"], object)})
    assert given["greeting"].tolist() == ["Hello Ada"]


def test_code_that_cannot_be_tried_is_served_as_its_owner_says(root: Path, tmp_path: Path) -> None:
    code = "def build(context):\n    def run(inputs):\n        raise ValueError('no picture')\n"
    (tmp_path / "model.py").write_text(code + "    return run\n")
    source, image = f"{tmp_path / 'model.py'}:build", [parse_tensor("image:bytes:batch")]

    with pytest.raises(PackageError, match=r"ValueError: no picture\. Declare .* with --output"):
        make(root, read(source, image))
    package = make(root, read(source, image, [parse_tensor("boxes:float32:batch,4")]))

    assert shapes(package) == {"image": ["batch"], "boxes": ["batch", 4]}


# -- What people type ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "dtype", "shape"),
    [
        ("x:float32:batch,3", "x", "float32", ("batch", 3)),
        ("x:FP16:[batch, 3]", "x", "float16", ("batch", 3)),
        ("serving_default:0:int64:n", "serving_default:0", "int64", ("n",)),
        ("x:bool:", "x", "bool", ()),
    ],
)
def test_tensors_are_read_as_people_write_them(text, name, dtype, shape) -> None:
    tensor = parse_tensor(text)

    assert (tensor.name, tensor.dtype, tensor.shape) == (name, dtype, shape)


@pytest.mark.parametrize("text", ["x", "x:float32", ":float32:batch", "x:float99:batch"])
def test_wrong_tensors_are_explained(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_tensor(text)


def test_task_and_description_are_the_owners(root: Path, tmp_path: Path) -> None:
    draft = read(str(linear(tmp_path / "net.onnx")))

    package = create(root, Identity("made", None, TaskType.EMBEDDING, "A layer."), draft, INFERENCE)

    assert package.manifest.task == "embedding"
    assert package.manifest.description == "A layer."
