"""The way that the guide describes: from a bare file to a model that is served."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from inferno.testing.platform import running_platform
from tests.e2e.test_readme import run
from tests.unit.inferno.onnx_files import linear
from tests.unit.test_docs import NOT_RUN, PACKAGING, blocks

#: The commands of the guide that write into the repository.
GUIDE = [
    block
    for block in blocks(PACKAGING, "bash")
    if any("tests/e2e/test_packaging.py" in NOT_RUN.get(line, "") for line in block.commands)
]


def test_the_guide_leads_from_a_bare_file_to_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear(tmp_path / "iris.onnx")
    monkeypatch.setenv("INFERNO_REPOSITORY__ROOT", str(tmp_path / "models"))
    new, validate, ask, carry = GUIDE

    def typed(block, url: str = "http://127.0.0.1:8000") -> str:
        return run(block, ["bash", "-euo", "pipefail"], url, tmp_path, cwd=tmp_path)

    assert "x            float32 [batch, 4]" in typed(new)
    assert "The package is sound." in typed(validate)
    data = tmp_path / "data"
    data.mkdir()
    with running_platform(data, {}, "--no-flower") as platform:
        answer = typed(ask, platform.url)
        assert "is in" in typed(carry)
    values = [float(value) for value in re.findall(r"\d+\.\d+(?=[,\]])", answer)]
    weights = np.arange(12).reshape(4, 3) / 10
    np.testing.assert_allclose(values[:3], np.array([5.1, 3.5, 1.4, 0.2]) @ weights, rtol=1e-5)
    assert (tmp_path / "models/flowers/1/model.onnx").is_file()
