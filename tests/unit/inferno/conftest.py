"""What the tests of the core share: small real model packages, and how hypothesis runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

from inferno.repository.package import Package

# The same examples in every run: a gate that fails by chance teaches people to repeat it.
hypothesis.settings.register_profile(
    "core", max_examples=50, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("core")

WritePackage = Callable[..., Path]

SIGNATURE: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2]}],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty model repository."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def write_package(root: Path) -> WritePackage:
    """Return a function that writes one version of a model and returns its folder.

    Keywords are fields of the manifest; None leaves a field out. `files` holds further files by
    name, and `text` replaces the whole manifest.
    """

    def write(
        name: str = "model",
        version: int | str = 1,
        *,
        files: dict[str, str | bytes] | None = None,
        text: str | bytes | None = None,
        **fields: Any,
    ) -> Path:
        folder = root / name / str(version)
        folder.mkdir(parents=True)
        manifest = {
            "name": name,
            "version": version,
            "format": "python",
            "entrypoint": "model:build",
            "signature": SIGNATURE,
        } | fields
        given = {key: value for key, value in manifest.items() if value is not None}
        files = {"model.yaml": yaml.safe_dump(given) if text is None else text} | (files or {})
        for file, content in files.items():
            raw = content.encode() if isinstance(content, str) else content
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(raw)
        return folder

    return write


@pytest.fixture
def package(write_package: WritePackage) -> Callable[..., Package]:
    """Return a function that writes a package and reads it."""
    return lambda *args, **fields: Package.read(write_package(*args, **fields))
