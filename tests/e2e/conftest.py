"""One platform with every default model, for all tests of this tier."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inferno.testing.platform import Platform, running_platform


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Run the whole platform until the end of the tests."""
    with running_platform(tmp_path_factory.mktemp("platform"), {}) as platform:
        yield platform
