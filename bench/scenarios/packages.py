"""Copies of the model `mock` that behave as a scenario needs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from inferno.testing.processes import ROOT

MOCK = ROOT / "models" / "mock" / "1"


def add_mock(repository: Path, name: str, **sections: Mapping[str, Any]) -> None:
    """Add a copy of `mock` to a model repository.

    Args:
      repository: folder of the repository.
      name: name of the model.
      sections: members to change in sections of model.yaml, such as
        ``batching={"max_batch_size": 1}``.
    """
    package = repository / name / "1"
    package.mkdir(parents=True)
    shutil.copy(MOCK / "model.py", package)
    manifest = yaml.safe_load((MOCK / "model.yaml").read_text())
    manifest["name"] = name
    for section, members in sections.items():
        manifest[section] |= members
    (package / "model.yaml").write_text(yaml.safe_dump(manifest))
