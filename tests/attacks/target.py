"""A platform to attack: as users start it, with the two models that bystanders call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inferno.testing.platform import Platform, running_platform
from inferno.testing.processes import ROOT
from tests.attacks.bystander import INPUTS


@contextmanager
def attacked_platform(folder: Path) -> Iterator[Platform]:
    """Run a platform in a folder until the end of the block."""
    models = folder / "models"
    models.mkdir()
    for name in INPUTS:
        (models / name).symlink_to(ROOT / "models" / name)
    env = {"INFERNO_REPOSITORY__ROOT": str(models)}
    with running_platform(folder, env, "--no-flower") as platform:
        yield platform
