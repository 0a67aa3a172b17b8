"""What entry points bring along; the directions of imports are checked by `make check`."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["inferno.cli.main", "inferno.client"])
def test_command_and_client_start_without_what_serves(module: str) -> None:
    # The contracts see imports of ours; this sees what those of others bring.
    heavy = "celery", "flask", "gevent", "kombu", "onnxruntime", "redis", "torch"
    code = f"import sys, {module}; print(*(m for m in {heavy} if m in sys.modules))"

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()

    assert loaded == []
