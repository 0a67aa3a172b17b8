"""The model repository: good packages, and what is said of broken ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferno.errors import ModelNotFound, PackageError
from inferno.repository.manifest import Manifest, TaskType
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import RepositorySettings
from tests.unit.inferno.conftest import SIGNATURE, WritePackage


def read(root: Path, **active: int) -> Repository:
    return Repository.read(RepositorySettings(root=root, active=active))


def broken(folder: Path) -> str:
    """Return what is said of a broken package, after the name of its file."""
    with pytest.raises(PackageError) as raised:
        Package.read(folder)
    file, _, detail = raised.value.detail.partition(": ")
    assert file == str(folder / "model.yaml")
    return detail


def test_a_package_says_what_it_is(write_package: WritePackage) -> None:
    folder = write_package(
        "sentiment",
        3,
        task="classification",
        description="Says how texts feel.",
        labels=["negative", "positive"],
        batching={"max_batch_size": 16, "max_batch_latency_ms": 5, "pad": {"ids": 0}},
        parameters={"max_tokens": 256},
    )
    package = Package.read(folder)
    assert (package.name, package.version, package.path) == ("sentiment", 3, folder)
    assert package.signature.batched
    manifest = package.manifest
    assert manifest.task is TaskType.CLASSIFICATION
    assert manifest.labels == ("negative", "positive")
    assert manifest.batching.max_batch_size == 16
    assert manifest.batching.max_batch_delay_ms == 5
    assert manifest.parameters == {"max_tokens": 256}


def test_defaults_leave_batching_to_the_settings(package: Callable[..., Package]) -> None:
    manifest = package().manifest
    assert manifest.batching.max_batch_size is None
    assert manifest.batching.max_batch_delay_ms is None
    assert manifest.batching.oversized == "split"
    assert manifest.codecs.default == "json"
    assert package("other").executors == 1
    assert manifest.task is TaskType.OTHER


@pytest.mark.parametrize(
    "name", ["max_batch_delay_ms", "max_batch_latency_ms", "max_batch_wait_ms"]
)
def test_the_window_has_three_names(package: Callable[..., Package], name: str) -> None:
    assert package(batching={name: 2.5}).manifest.batching.max_batch_delay_ms == 2.5


def test_every_field_of_a_manifest_has_a_description() -> None:
    sections = [Manifest, *(f.annotation for f in Manifest.model_fields.values())]
    for section in sections:
        for name, info in getattr(section, "model_fields", {}).items():
            assert info.description, f"{section}.{name}"


TENSOR = {"name": "x", "dtype": "float32", "shape": ["batch", 2]}


def with_input(**changes: Any) -> dict[str, Any]:
    return {"signature": SIGNATURE | {"inputs": [TENSOR | changes]}}


@pytest.mark.parametrize(
    ("fields", "place", "value", "expectation"),
    [
        ({"signature": None}, "signature", None, "field required"),
        ({"format": None}, "format", None, "field required"),
        ({"typo": 1}, "typo", None, "extra inputs are not permitted"),
        ({"batching": {"typo": 1}}, "batching.typo", None, "extra inputs are not permitted"),
        ({"batching": {"max_batch_size": 0}}, "batching.max_batch_size", "0", "greater than or"),
        ({"cache": {"ttl_s": float("inf")}}, "cache.ttl_s", "inf", "less than or equal to"),
        (
            {"batching": {"max_batch_delay_ms": -1}},
            "batching.max_batch_delay_ms",
            "-1",
            "greater than or equal to 0",
        ),
        ({"batching": {"oversized": "cut"}}, "batching.oversized", "'cut'", "'split' or 'refuse'"),
        ({"batching": {"buckets": [8]}}, "batching", None, "needs `pad`, which names"),
        (
            {"batching": {"buckets": [16, 8], "pad": {"x": 0}}},
            "batching.buckets",
            None,
            "[16, 8]: expected ascending sizes",
        ),
        ({"batching": {"batch_sizes": [0]}}, "batching.batch_sizes.0", "0", "greater than or"),
        (
            {"batching": {"batch_sizes": [1, 8], "max_batch_size": 9}},
            "batching",
            None,
            "max_batch_size: 9: expected at most the last of batch_sizes",
        ),
        ({"batching": {"pad": {"x": None}}}, "batching.pad.x.float", "None", "valid number"),
        ({"batching": {"pad": {"x": "no"}}}, "batching.pad.x", "'no'", "expected a number"),
        (
            {"concurrency": {"max_concurrency": 65}},
            "concurrency.max_concurrency",
            "65",
            "less than or equal to 64",
        ),
        ({"codecs": {"default": "xml"}}, "codecs.default", "'xml'", "'json' or 'base64'"),
        ({"task": "magic"}, "task", "'magic'", "'classification', 'detection'"),
        ({"labels": [True]}, "labels.0", "True", "valid string"),
        ({"retries": {"max_retries": -1}}, "retries.max_retries", "-1", "greater than or equal"),
        (with_input(dtype="complex64"), "signature.inputs.0.dtype", "'complex64'", "one of bool"),
        (
            with_input(content="video"),
            "signature.inputs.0.content",
            "'video'",
            "'text', 'image' or 'audio'",
        ),
        (with_input(shape=["batch", -1]), "signature.inputs.0.shape", None, "positive integers"),
        (with_input(shape=[2]), "signature", None, "either every tensor has `batch`"),
        ({"signature": {"inputs": [TENSOR]}}, "signature.outputs", None, "field required"),
        (
            {
                "signature": {
                    "inputs": [TENSOR | {"shape": [2]}],
                    "outputs": [TENSOR | {"shape": [2]}],
                },
                "batching": {"max_batch_size": 8},
            },
            "batching.max_batch_size",
            "8",
            "expected 1, because no tensor has `batch` as its first dimension",
        ),
    ],
)
def test_a_broken_manifest_names_file_field_value_and_expectation(
    write_package: WritePackage,
    fields: dict[str, Any],
    place: str,
    value: str | None,
    expectation: str,
) -> None:
    detail = broken(write_package(**fields))
    start = f"{place}: " if value is None else f"{place}: {value}: "
    assert detail.startswith(start)
    assert expectation in detail[len(start) :]


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "expected a mapping of fields"),
        ("- a", "expected a mapping of fields"),
        ("a: [", "not valid YAML"),
        ("a: &x 1\nb: *y", "not valid YAML"),
        ("a: 2024-13-01", "not valid YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("[" * 1000, "not valid YAML"),
        (b"a: \xff", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(
    write_package: WritePackage, text: str | bytes, detail: str
) -> None:
    assert detail in broken(write_package(text=text))


def test_a_manifest_is_utf_8_whatever_the_locale(write_package: WritePackage) -> None:
    folder = write_package(text=yaml.safe_dump(
        {"name": "model", "version": 1, "format": "python", "signature": SIGNATURE,
         "description": "Übersetzt Sätze."}, allow_unicode=True))  # fmt: skip
    program = (
        "import sys; from pathlib import Path; from inferno.repository.package import Package; "
        "print(ascii(Package.read(Path(sys.argv[1])).manifest.description))"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, folder],
        env=os.environ | plain, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == ascii("Übersetzt Sätze.")


def test_a_long_value_is_shortened(write_package: WritePackage) -> None:
    assert "'" + "x" * 76 + "...: " in broken(write_package(task="x" * 10_000))


def test_a_missing_manifest_is_told(tmp_path: Path) -> None:
    assert broken(tmp_path) == "cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("folder", "field", "detail"),
    [
        (("model", 1), {"name": "other"}, "name: 'other' differs from the folder's name 'model'"),
        (("model", 1), {"version": 2}, "version: 2 differs from the folder's name '1'"),
        (("model", "01"), {"version": 1}, "version: 1 differs from the folder's name '01'"),
    ],
)
def test_the_folder_and_the_manifest_agree(
    write_package: WritePackage, folder: tuple[str, Any], field: dict[str, Any], detail: str
) -> None:
    good = {"name": "model", "version": 1, "format": "python", "signature": SIGNATURE}
    assert broken(write_package(*folder, text=yaml.safe_dump(good | field))) == detail


@pytest.mark.parametrize("name", ["Upper", "_private", "spa ce", "a" * 65])
def test_a_bad_name_is_refused(write_package: WritePackage, name: str) -> None:
    assert broken(write_package(name)).startswith(f"name: {name!r}: string should match pattern")


# Several versions


def test_a_model_cannot_be_called_like_the_queue_of_webhooks(write_package: WritePackage) -> None:
    assert "is reserved for a queue" in broken(write_package("webhooks", 1))


def test_the_highest_version_is_active(write_package: WritePackage, root: Path) -> None:
    for version in (9, 10, 2):
        write_package("a", version)
    model = read(root).model("a")
    assert sorted(model.versions) == [2, 9, 10]
    assert model.active == 10
    assert model.package().version == 10
    assert model.package(2).version == 2


def test_the_settings_can_choose_the_active_version(
    write_package: WritePackage, root: Path
) -> None:
    write_package("a", 1)
    write_package("a", 2)
    assert read(root, a=1).model("a").package().version == 1


def test_a_broken_version_takes_no_good_one_down(write_package: WritePackage, root: Path) -> None:
    # Given a good version, a broken one over it, and another model
    write_package("a", 1)
    write_package("a", 2, text="a: [")
    write_package("b", 1)
    repository = read(root)
    # Then the good ones are served, and the broken one is told
    assert sorted(repository.models) == ["a", "b"]
    assert repository.model("a").active == 1
    assert "not valid YAML" in repository.model("a").errors["2"]
    assert repository.errors == {}


def test_a_model_without_a_good_version_is_listed_as_an_error(
    write_package: WritePackage, root: Path
) -> None:
    write_package("a", 1, text="a: [")
    write_package("b", 1)
    repository = read(root)
    assert sorted(repository.models) == ["b"]
    assert "a/1/model.yaml: not valid YAML" in repository.errors["a"]


def test_an_active_version_that_is_broken_or_missing_is_not_replaced_by_another(
    write_package: WritePackage, root: Path
) -> None:
    write_package("a", 1)
    write_package("a", 2, text="a: [")
    assert "a/2/model.yaml: not valid YAML" in read(root, a=2).errors["a"]
    assert read(root, a=7).errors["a"] == "INFERNO_REPOSITORY__ACTIVE: a has no version 7"
    assert read(root, a=7).models == {}


def test_an_active_version_of_no_model_is_told(write_package: WritePackage, root: Path) -> None:
    write_package("a", 1)
    repository = read(root, typo=1)
    assert repository.errors == {"typo": "INFERNO_REPOSITORY__ACTIVE: model 'typo' does not exist"}
    assert sorted(repository.models) == ["a"]


def test_what_is_no_package_is_left_alone(write_package: WritePackage, root: Path) -> None:
    # Given files, and folders without a manifest, beside a model
    write_package("a", 1, files={"model.py": ""})
    (root / "README.md").write_text("")
    (root / "__pycache__").mkdir()
    (root / "a" / "notes").mkdir()
    (root / "a" / "shared.py").write_text("")
    assert sorted(read(root).model("a").versions) == [1]


def test_no_repository_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"nowhere.*INFERNO_REPOSITORY__ROOT"):
        read(tmp_path / "nowhere")


def test_an_empty_repository_has_no_models(root: Path) -> None:
    assert read(root).models == {}


@pytest.mark.parametrize("name", ["", "b", "../models/a", "a/1", ".", "..", "a\0", "A", "x" * 9999])
def test_only_exact_names_find_a_model(write_package: WritePackage, root: Path, name: str) -> None:
    write_package("a", 1)
    with pytest.raises(ModelNotFound, match="model not found or not loaded") as raised:
        read(root).model(name)
    assert raised.value.field == "model"


@pytest.mark.parametrize("version", [0, -1, 3])
def test_an_unknown_version_is_told_with_the_known_ones(
    write_package: WritePackage, root: Path, version: int
) -> None:
    write_package("a", 1)
    write_package("a", 2)
    with pytest.raises(ModelNotFound, match=f"model a has no version {version}; it has 1, 2"):
        read(root).model("a").package(version)


# What must stay in a model's folder


@pytest.mark.parametrize("artifact", ["/etc/passwd", "../../../secret", "../../b/1/model.onnx"])
@pytest.mark.parametrize("field", ["artifact", "entrypoint", "processor"])
def test_paths_out_of_the_models_folder_are_refused(
    write_package: WritePackage, field: str, artifact: str
) -> None:
    given = artifact if field == "artifact" else f"{artifact}:build"

    detail = broken(write_package("a", **{field: given}))

    assert detail.startswith(f"{field}: '{given}': expected a path inside the model's folder")


@pytest.mark.parametrize("artifact", ["model.onnx", "../model.onnx", "../2/model.onnx", "."])
def test_versions_share_the_files_of_their_model(
    write_package: WritePackage, artifact: str
) -> None:
    assert Package.read(write_package("a", artifact=artifact)).manifest.artifact == artifact


@pytest.mark.parametrize("name", ["notes.txt", "deeper"])
def test_links_out_of_the_models_folder_are_refused(
    write_package: WritePackage, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    folder = write_package("a")
    (folder / name).symlink_to(tmp_path / ("secret" if name == "deeper" else "secret/key"))

    with pytest.raises(PackageError, match=f"{name}: is a symbolic link out of the model's folder"):
        Package.read(folder)


def test_a_model_or_version_may_itself_be_a_link(
    write_package: WritePackage, root: Path, tmp_path: Path
) -> None:
    folder = write_package("a", processor="../shared:build", files={"real.bin": "x"})
    (folder / "linked.bin").symlink_to("real.bin")
    for place in ("other", "third/a"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "other" / "a").symlink_to(root / "a")
    (tmp_path / "third" / "a" / "1").symlink_to(folder)

    assert read(tmp_path / "other").models.keys() == {"a"}
    assert read(tmp_path / "third").models.keys() == {"a"}


# Packages that are code


DATA = {"format": "onnx", "entrypoint": None}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "format python"),
        ({"format": "torchscript", "entrypoint": None}, "format torchscript"),
        (DATA | {"processor": "processor:build"}, "processor processor:build"),
        (DATA | {"processor": "os.path:join"}, "processor os.path:join"),
        (DATA | {"processor": "inferno.processors.text:Path"}, "inferno.processors.text:Path"),
        (DATA | {"processor": "inferno.processors.a.b:build"}, "inferno.processors.a.b:build"),
    ],
)
def test_packages_that_are_code_can_be_forbidden(
    write_package: WritePackage, root: Path, fields: dict[str, Any], code: str
) -> None:
    write_package("a", 1, **DATA)
    write_package("a", 2, **fields)
    write_package("b", 1, **fields)

    found = Repository.read(RepositorySettings(root=root, allow_code=False))

    assert found.models["a"].active == 1
    reason = found.models["a"].errors["2"]
    assert code in reason
    assert reason.endswith("is code, which INFERNO_REPOSITORY__ALLOW_CODE=false forbids")
    assert found.errors.keys() == {"b"}
    assert read(root).models["a"].active == 2


@pytest.mark.parametrize("fields", [{}, {"processor": "inferno.processors.text:build"}])
def test_packages_that_are_data_are_served_without_code(
    write_package: WritePackage, root: Path, fields: dict[str, Any]
) -> None:
    write_package("a", **DATA | fields)

    assert Repository.read(RepositorySettings(root=root, allow_code=False)).models.keys() == {"a"}
