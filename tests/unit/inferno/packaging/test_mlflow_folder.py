"""Packages from MLflow models: folders as MLflow writes them, with the file MLmodel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from inferno.errors import PackageError
from inferno.packaging.reading import read
from tests.unit.inferno.onnx_files import linear
from tests.unit.inferno.packaging.test_creation import answer, make, shapes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def tensor(dtype: str, *shape: int, **name: str) -> dict[str, Any]:
    return {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}} | name


def logged(folder: Path, flavors: dict[str, Any], inputs: list[Any], outputs: list[Any]) -> str:
    """Write MLmodel as MLflow does: the sides of the signature are JSON in YAML."""
    folder.mkdir(exist_ok=True)
    document = {
        "artifact_path": "model",
        "flavors": flavors,
        "mlflow_version": "3.17.2",
        "model_uuid": "0123456789abcdef",
        "utc_time_created": "2026-11-28 20:00:00.000000",
        "signature": {
            "inputs": json.dumps(inputs),
            "outputs": json.dumps(outputs),
            "params": None,
        },
    }
    (folder / "MLmodel").write_text(yaml.safe_dump(document))
    (folder / "requirements.txt").write_text("mlflow\n")
    return str(folder)


def test_the_onnx_flavour_is_served_as_onnx(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pyfunc = {"loader_module": "mlflow.onnx", "data": "model.onnx"}
    flavors = {"onnx": {"data": "model.onnx", "onnx_version": "1.23.2"}, "python_function": pyfunc}
    source = logged(
        folder, flavors, [tensor("float32", -1, 4, name="x")], [tensor("float32", -1, 3)]
    )
    linear(folder / "model.onnx")

    package = make(root, read(source))

    assert package.manifest.format == "onnx"
    assert shapes(package) == {"x": ["batch", 4], "y": ["batch", 3]}
    assert {path.name for path in package.path.iterdir()} == {"model.yaml", "model.onnx"}


def test_the_pytorch_flavour_has_the_shapes_of_its_signature(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    flavors = {"pytorch": {"model_data": "data", "pytorch_version": "2.13.0", "code": None}}
    source = logged(folder, flavors, [tensor("float32", -1, 4)], [tensor("float32", -1, 2)])
    (folder / "data").mkdir()
    torch.jit.script(torch.nn.Linear(4, 2)).save(folder / "data" / "model.pth")

    package = make(root, read(source))

    assert shapes(package) == {"input": ["batch", 4], "output": ["batch", 2]}
    assert answer(package, {"input": np.ones((3, 4), np.float32)})["output"].shape == (3, 2)


def test_a_pickled_pytorch_model_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    source = logged(folder, {"pytorch": {"model_data": "data"}}, [tensor("float32", -1, 4)], [])
    (folder / "data").mkdir()
    torch.save(torch.nn.Linear(4, 2), folder / "data" / "model.pth")

    with pytest.raises(PackageError, match="needs the model's classes"):
        read(source)


LOADER = """
import json
import pathlib
from factors import scale

class Model:
    def __init__(self, factor):
        self.factor = factor

    def predict(self, given):
        return scale(given, self.factor)

def _load_pyfunc(path):
    return Model(json.loads(pathlib.Path(path).read_text()))
"""


@pytest.fixture
def pyfunc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that logs a model with a loader of its own, as `code_paths` does."""
    # Its code goes to the path of modules.
    monkeypatch.setattr(sys, "path", list(sys.path))

    def log(loader: str, scale: str, inputs: list[Any], outputs: list[Any]) -> str:
        folder = tmp_path / "model"
        flavor = {"loader_module": loader, "data": "data/factor.json", "code": "code"}
        source = logged(folder, {"python_function": flavor}, inputs, outputs)
        (folder / "data").mkdir()
        (folder / "data" / "factor.json").write_text("3")
        (folder / "code").mkdir()
        factors = f"{loader}_factors"
        (folder / "code" / f"{loader}.py").write_text(LOADER.replace("factors", factors))
        (folder / "code" / f"{factors}.py").write_text(f"def scale(given, n): return {scale}\n")
        return source

    return log


def test_a_python_function_gets_an_array(root: Path, pyfunc) -> None:
    source = pyfunc(
        "one_array", "given * n", [tensor("float64", -1, 2)], [tensor("float64", -1, 2)]
    )

    package = make(root, read(source))

    assert shapes(package) == {"inputs": ["batch", 2], "output": ["batch", 2]}
    assert (package.path / "mlflow" / "MLmodel").is_file()
    given = answer(package, {"inputs": np.array([[1.0, 2.0]])})
    assert given["output"].tolist() == [[3.0, 6.0]]


def test_a_python_function_gets_several_arrays_by_name(root: Path, pyfunc) -> None:
    inputs = [tensor("float32", -1, name="a"), tensor("float32", -1, name="b")]
    source = pyfunc("two_arrays", "{'sum': given['a'] + n * given['b']}", inputs, [])

    package = make(root, read(source))

    assert shapes(package) == {"a": ["batch"], "b": ["batch"], "sum": ["batch"]}
    one = np.ones(2, np.float32)
    assert answer(package, {"a": one, "b": one})["sum"].tolist() == [4.0, 4.0]


def test_columns_are_inputs_of_their_own(pyfunc) -> None:
    inputs = [
        {"type": "double", "name": "width (cm)", "required": True},
        {"type": "string", "name": "kind", "required": False},
    ]

    draft = read(pyfunc("columns", "given", inputs, [tensor("int64", -1)]))

    assert [(t.name, t.dtype, t.shape, t.optional) for t in draft.inputs] == [
        ("width (cm)", "float64", ("batch",), False),
        ("kind", "string", ("batch",), True),
    ]
    assert "install pandas" in draft.notes[0]


def test_models_that_need_mlflow_say_so(tmp_path: Path) -> None:
    flavor = {"loader_module": "mlflow.sklearn", "model_path": "model.pkl"}
    source = logged(tmp_path / "model", {"python_function": flavor}, [tensor("float64", -1, 4)], [])

    assert "mlflow.sklearn loads the model: install mlflow" in read(source).notes[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a list", "expected a mapping with `flavors`"),
        ("flavors: {spark: {}}", "has the flavors spark; expected onnx, pytorch or"),
        (
            "flavors: {onnx: {data: ../secret.onnx}}",
            "../secret.onnx does not exist in the folder, or leads out",
        ),
        ("flavors: {python_function: {loader_module: x}}", "was logged without a signature"),
    ],
)
def test_folders_that_cannot_be_served_are_explained(tmp_path: Path, text, reason) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    linear(tmp_path / "secret.onnx")
    (folder / "MLmodel").write_text(text)

    with pytest.raises(PackageError, match=reason):
        read(str(folder))


def test_links_out_of_the_folder_are_not_copied(tmp_path: Path) -> None:
    flavor = {"loader_module": "loader", "data": "data"}
    source = logged(tmp_path / "model", {"python_function": flavor}, [tensor("float64", -1, 4)], [])
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model" / "notes.txt").symlink_to(tmp_path / "secret")

    with pytest.raises(PackageError, match=r"notes\.txt does not exist in the folder, or leads"):
        read(source)
