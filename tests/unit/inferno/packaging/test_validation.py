"""What `inferno models validate` finds in packages that are right, and in those that are not."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from inferno.packaging.samples import picture
from inferno.packaging.validation import Report, validate
from inferno.settings import BatchingSettings, InferenceSettings, RepositorySettings, Settings
from tests.unit.inferno.conftest import WritePackage
from tests.unit.inferno.onnx_files import linear

SETTINGS = Settings().model_copy(
    update={
        "batching": BatchingSettings(max_batch_size=4),
        "inference": InferenceSettings(device="cpu", threads=1),
    }
)


def code(*lines: str, head: str = "") -> dict[str, str]:
    """Return the files of a model whose function has these lines, with `x` and numpy."""
    body = "\n".join(f"        {line}" for line in lines)
    start = "def build(context):\n    def run(inputs):\n        x = inputs['x']\n"
    return {"model.py": f"import numpy as np\n{head}\n{start}{body}\n    return run\n"}


@pytest.fixture
def tried(write_package: WritePackage):
    """Return a function that writes a package and validates it."""

    def try_(*lines: str, head: str = "", tolerance: float | None = None, **fields: Any) -> Report:
        folder = write_package(files=code(*lines, head=head), **fields)
        return validate(folder, SETTINGS, tolerance)

    return try_


def found(report: Report, state: str) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if check.state == state}


def seen(report: Report) -> dict[str, tuple[int, str]]:
    """What clients see, by what they sent."""
    return {
        answer.case: (answer.problem["status"], answer.problem["detail"])
        if answer.problem
        else (200, "")
        for answer in report.bad_inputs
    }


def test_nothing_is_wrong_with_a_good_package(write_package: WritePackage) -> None:
    folder = write_package(
        format="onnx",
        entrypoint=None,
        artifact="model.onnx",
        signature={
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 3]}],
        },
    )
    linear(folder / "model.onnx")

    report = validate(folder, SETTINGS)

    assert report.ok
    assert not found(report, "warning")
    assert set(report.latency_ms) == {1, 2, 4}
    assert "4 rows together, 4 of them different" in found(report, "ok")["batched"]
    sights = seen(report)
    assert set(dict(sights.values())) == {422}
    assert sights["x: 5 instead of 4"] == (422, "expected shape [batch, 4], got [1, 5]")
    assert sights["x: text instead of numbers"] == (422, "expected float32 values, got text")


def test_rows_that_change_each_other_are_found(tried) -> None:
    report = tried("return {'y': x - x.mean(axis=0)}")

    assert not report.ok
    assert "not as alone, y differs by" in found(report, "failure")["batched"]


@pytest.mark.parametrize(
    ("asked", "stated", "ok"), [(0.5, None, True), (None, 0.5, True), (0.0, 0.5, False)]
)
def test_the_package_and_whoever_asks_say_how_much_is_too_much(tried, asked, stated, ok) -> None:
    # One part in a hundred of what the whole batch has.
    body = "return {'y': x + 1 + 0.01 * x.sum()}"
    report = tried(body, tolerance=asked, batching={"tolerance": stated})

    assert report.ok is ok


@pytest.mark.parametrize(("declared", "state"), [(False, "warning"), (True, "failure")])
def test_random_outputs_matter_where_they_are_promised_not_to_be(tried, declared, state) -> None:
    random = "return {'y': x + np.random.default_rng().random(x.shape).astype('float32')}"

    report = tried(random, deterministic=declared)

    assert "the same input gives different outputs" in found(report, state)["repeat"]
    assert report.ok is not declared


def test_a_model_that_fails_on_several_rows_is_found(tried) -> None:
    report = tried("if len(x) > 2: raise RuntimeError('too many')", "return {'y': x}")

    assert found(report, "failure")["batched"] == "fails on 4 rows together: RuntimeError: too many"
    assert "fails on its warm-up sample" in found(report, "failure")["warm-up"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("return {'z': x}", "the model returned no output 'y'; it returned z"),
        ("return {'y': x[:, :1]}", "has shape [1, 1], declared is"),
        ("return {'y': x * np.nan}", "holds NaN or infinity"),
        ("raise KeyError('token')", "KeyError: 'token'"),
    ],
)
def test_outputs_that_are_not_as_declared_are_found(tried, line: str, reason: str) -> None:
    report = tried(line)

    assert not report.ok
    assert reason in found(report, "failure")["answer"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"formt": "onnx"}, "formt: extra inputs are not permitted"),
        ({"entrypoint": "other:build"}, "other:build: FileNotFoundError"),
        ({"format": "onnx", "entrypoint": None}, "model.onnx is missing"),
    ],
)
def test_packages_that_cannot_be_loaded_are_explained(tried, fields, reason: str) -> None:
    report = tried("return {'y': x}", **fields)

    assert not report.ok
    assert reason in report.checks[-1].detail


TEXTS = {
    "inputs": [{"name": "x", "dtype": "string", "shape": ["batch"]}],
    "outputs": [{"name": "y", "dtype": "int64", "shape": ["batch"]}],
}


def test_a_crash_on_odd_text_is_what_a_client_sees(tried) -> None:
    count = "return {'y': np.array([len(text.split()[0]) for text in x])}"

    report = tried(count, signature=TEXTS)

    assert report.ok
    assert (
        "x: only spaces. Raise a ValueError in preprocess" in found(report, "warning")["bad input"]
    )
    sights = seen(report)
    assert sights["x: only spaces"][0] == 500
    assert "model failed: IndexError: list index out of range" in sights["x: only spaces"][1]
    assert sights["x: an empty text"] == (422, "expected text, got an empty string")


def test_a_text_that_the_model_refuses_is_shown_as_clients_see_it(tried) -> None:
    head = (
        "def check(inputs):\n    if not inputs['x'][0].strip(): raise ValueError('say something')"
    )
    count = "return {'y': np.array([len(text) for text in x])}"
    attach = "run.preprocess = lambda i: (check(i), i)[1]"

    report = tried(count, head=head, signature=TEXTS)
    assert seen(report)["x: only spaces"] == (200, "")
    files = code(count, head=head)
    files["model.py"] = files["model.py"].replace("    return run", f"    {attach}\n    return run")
    folder = report.path.parent / "2"
    folder.mkdir()
    manifest = (report.path / "model.yaml").read_text().replace("version: 1", "version: 2")
    (folder / "model.yaml").write_text(manifest)
    (folder / "model.py").write_text(files["model.py"])

    assert seen(validate(folder, SETTINGS))["x: only spaces"] == (422, "say something")


def test_a_wrong_padding_value_is_found(tried) -> None:
    free = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "n"]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
    }
    total = "return {'y': x.sum(axis=1)}"

    good = tried(total, signature=free, batching={"pad": {"x": 0}})
    bad = tried(total, version=2, signature=free, batching={"pad": {"x": 9}})

    assert good.ok
    assert "not as alone" in found(bad, "failure")["batched"]


def test_labels_have_to_be_as_many_as_scores(tried) -> None:
    report = tried("return {'y': x}", labels=["one", "two", "three"])

    assert "3 labels" in found(report, "warning")["labels"]


def test_unbatched_models_are_run_alone(tried) -> None:
    whole = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["n", 2]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [2]}],
    }

    report = tried("return {'y': x.sum(axis=0)}", signature=whole)

    assert report.ok
    assert set(report.latency_ms) == {1}
    assert "each task needs its own pass" in found(report, "ok")["manifest"]


def test_pictures_are_cut_off_and_replaced(tried) -> None:
    pictures = {
        "inputs": [{"name": "x", "dtype": "bytes", "shape": ["batch"], "content": "image"}],
        "outputs": [{"name": "y", "dtype": "int64", "shape": ["batch"]}],
    }
    head = "import io\nfrom PIL import Image"
    width = "return {'y': np.array([Image.open(io.BytesIO(raw)).convert('L').width for raw in x])}"

    sample = {"inputs": {"x": base64.b64encode(picture()).decode()}}
    report = tried(width, head=head, signature=pictures, warm_up=sample)

    sights = seen(report)
    assert sights["x: not an image"][0] == 422
    assert sights["x: cut off in the middle"][0] == 500
    assert "x: cut off in the middle" in found(report, "warning")["bad input"]


def test_code_is_not_loaded_where_the_settings_forbid_it(
    write_package: WritePackage, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    folder = write_package(files=code("pass", head=f"open({str(marker)!r}, 'w')"))
    repository = RepositorySettings(allow_code=False)

    report = validate(folder, SETTINGS.model_copy(update={"repository": repository}))

    assert not report.ok
    assert "INFERNO_REPOSITORY__ALLOW_CODE=false forbids" in found(report, "failure")["manifest"]
    assert not marker.exists()
