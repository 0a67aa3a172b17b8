"""The platform that is attacked: three models, and nobody waits for long."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inferno.testing.platform import Platform, running_platform
from inferno.testing.processes import ROOT

#: The bystander's, the one that is paused and purged, and one that takes images.
MODELS = ("echo", "mock", "digits")
ENV = {
    "INFERNO_SERVER__SYNC_WAIT_MS": "1000",
    "INFERNO_REPOSITORY__LOAD_TIMEOUT_S": "2",
}


@contextmanager
def target(folder: Path) -> Iterator[Platform]:
    """Run the platform, with its files in a folder, until the end of the block."""
    models, data = folder / "models", folder / "data"
    data.mkdir()
    for model in MODELS:
        shutil.copytree(ROOT / "models" / model, models / model)
    env = {**ENV, "INFERNO_REPOSITORY__ROOT": str(models)}
    with running_platform(data, env, "--no-flower") as platform:
        yield platform
