"""A platform that is attacked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inferno.testing.platform import Platform
from tests.fuzz.target import target


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Run a platform for one module: what the tests of another leave paused is not its concern."""
    with target(tmp_path_factory.mktemp("fuzz")) as platform:
        yield platform
