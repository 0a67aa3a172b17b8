"""A platform that is attacked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inferno.testing.platform import Platform
from tests.fuzz.target import target


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Run the platform until the end of the tests."""
    with target(tmp_path_factory.mktemp("fuzz")) as platform:
        yield platform
