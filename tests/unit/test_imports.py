"""Imports run in one direction; the contracts stand in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[2]


def test_import_contracts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


@pytest.mark.parametrize("module", ["inferno.cli", "inferno.client"])
def test_command_and_client_start_without_what_serves(module: str) -> None:
    # The contracts see imports of ours; this sees what those of others bring.
    heavy = "celery", "flask", "gevent", "kombu", "onnxruntime", "redis", "torch"
    code = f"import sys, {module}; print(*(m for m in {heavy} if m in sys.modules))"

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()

    assert loaded == []
