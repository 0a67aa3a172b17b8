"""`inferno models` as people type it: from an artifact to a package, and what is wrong with one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from inferno.cli.main import main
from tests.unit.inferno.onnx_files import linear


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project to be in."""
    for name in ("Procfile", "celeryconfig.py"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERNO_BATCHING__MAX_BATCH_SIZE", "2")
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def test_a_bare_file_becomes_a_valid_package(home: Path) -> None:
    linear(home / "net.onnx")

    made = invoke("new", "layer", "--from", "net.onnx", "--task", "embedding")

    assert made.exit_code == 0, made.output
    assert "layer version 1 is in models/layer/1" in made.output
    assert "inferno models validate layer/1" in made.output
    assert (
        'curl http://127.0.0.1:8000/v1/models/layer:predict -d \'{"inputs": {"x": '
        "[[0.0, 0.0, 0.0, 0.0]]}}'" in made.output
    )
    manifest = yaml.safe_load((home / "models/layer/1/model.yaml").read_text())
    assert manifest["task"] == "embedding"

    checked = invoke("validate", "layer")

    assert checked.exit_code == 0, checked.output
    assert "✓ batched" in checked.output
    assert "expected shape [batch, 4], got [1, 5]" in checked.output
    assert "The package is sound." in checked.output


def test_files_are_found_from_where_one_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "deeper").mkdir()
    linear(home / "deeper" / "net.onnx")
    monkeypatch.chdir(home / "deeper")

    made = invoke("new", "layer", "--from", "net.onnx", "--root", "elsewhere")

    assert made.exit_code == 0, made.output
    assert (home / "deeper/elsewhere/layer/1/model.onnx").is_file()
    monkeypatch.chdir(home / "deeper")
    checked = invoke("validate", "elsewhere/layer/1", "--json")
    report = json.loads(checked.output)
    assert report["ok"]
    assert report["latency_ms"].keys() == {"1", "2"}
    assert len(report["digest"]) == 16
    case = {answer["case"]: answer["problem"] for answer in report["bad_inputs"]}
    assert case["an unknown input"]["code"] == "invalid_input"


def test_the_example_of_large_inputs_is_a_command_that_writes_them(home: Path) -> None:
    code = (
        "def build(context):\n    return lambda inputs: {'mean': inputs['image'].mean((1, 2, 3))}"
    )
    (home / "mean.py").write_text(code)

    image = "image:float32:batch,3,224,224"
    made = invoke("new", "mean", "--from", "mean.py:build", "--input", image)

    assert made.exit_code == 0, made.output
    (command,) = [line for line in made.output.splitlines() if "python3 -c" in line]
    program = command.partition("|")[0]
    body = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    image_sent = json.loads(body)["inputs"]["image"]
    assert image_sent["shape"] == [1, 3, 224, 224]
    assert len(image_sent["data"]) == 3 * 224 * 224


def test_what_is_wrong_with_a_version_is_told_by_the_exit_code(home: Path) -> None:
    linear(home / "net.onnx")
    invoke("new", "layer", "--from", "net.onnx")
    manifest = home / "models/layer/1/model.yaml"
    manifest.write_text(manifest.read_text().replace("[batch, 3]", "[batch, 7]"))

    checked = invoke("validate", "layer/1")

    assert checked.exit_code == 1
    assert "✗ answer" in checked.output
    assert "Do not serve this package." in checked.output


@pytest.mark.parametrize("target", ["layer", "layer/2", "missing"])
def test_versions_that_there_are_not_are_named(home: Path, target: str) -> None:
    (home / "models" / "layer" / "1").mkdir(parents=True)

    checked = invoke("validate", target)

    assert checked.exit_code == 1
    assert f"model '{target}' does not exist in models" in checked.stderr


def test_versions_are_pushed_and_pulled(home: Path) -> None:
    linear(home / "net.onnx")
    invoke("new", "layer", "--from", "net.onnx")

    pushed = invoke("push", "layer", "store")
    pulled = invoke("pull", "store/layer/1", "--name", "copy")

    assert pushed.exit_code == 0, pushed.output
    assert f"inferno models pull {home}/store/layer/1" in pushed.output
    assert pulled.exit_code == 0, pulled.output
    assert "copy version 1 is in models/copy/1" in pulled.output
