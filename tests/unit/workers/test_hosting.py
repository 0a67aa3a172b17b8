"""What a hosted model takes from its package, and what from the settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from inferno.repository import Model, Package
from inferno.settings import Settings
from workers.hosting import HostedModel
from workers.watchdog import Watchdog

X = {"name": "x", "dtype": "float32", "shape": ["batch"]}


def hosted(folder: Path, batching: Mapping[str, object], **defaults: object) -> HostedModel:
    path = folder / "m" / "1"
    path.mkdir(parents=True)
    manifest = {
        "name": "m",
        "version": 1,
        "format": "python",
        "signature": {"inputs": [X], "outputs": [X | {"name": "y"}]},
        "batching": dict(batching),
    }
    (path / "model.yaml").write_text(yaml.safe_dump(manifest))
    settings = Settings()
    given = settings.model_copy(update={"batching": settings.batching.model_copy(update=defaults)})
    return HostedModel(Model("m", {1: Package.read(path)}, 1), given, Watchdog(), pytest.fail)


@pytest.mark.parametrize(
    ("own", "default", "objective_s"),
    [(None, None, None), (None, 80.0, 0.08), (50, None, 0.05), (50, 80.0, 0.05)],
)
def test_the_objective_of_a_model_goes_before_that_of_the_settings(
    tmp_path: Path, own: float | None, default: float | None, objective_s: float | None
) -> None:
    batching = {} if own is None else {"slo_p95_ms": own}
    assert hosted(tmp_path, batching, slo_p95_ms=default).objective_s == objective_s


def test_the_largest_declared_batch_decides_how_much_is_fetched(tmp_path: Path) -> None:
    model = hosted(tmp_path, {"batch_sizes": [1, 4, 12]})
    assert model.max_batch_size == 12
    assert model.prefetch == 36
