"""Attacks of one client, beside another that calls the platform ten times a second."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inferno.testing.platform import Platform
from tests.attacks.attacks import ATTACKS
from tests.attacks.target import attacked_platform
from tests.attacks.trial import run

#: Longest wait of a bystander, in seconds.
WORST_S = 1.0

#: The same beside the other tests of `make test`, which use the processors as well.
WORST_SHORT_S = 1.5

SHORT = [name for name, attack in ATTACKS.items() if attack.short]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with attacked_platform(tmp_path_factory.mktemp("attacks")) as running:
        yield running


def survives(platform: Platform, name: str, seconds: float, after_s: float, worst_s: float) -> None:
    """Attack a platform, and check that nobody else notices."""
    outcome = run(ATTACKS[name], platform.url, platform.popen.pid, seconds, after_s)
    assert outcome.kept.calls > 5
    assert outcome.fresh.calls > 5
    assert outcome.errors == []
    assert outcome.died == []
    assert outcome.findings == []
    assert outcome.worst_s < worst_s


@pytest.mark.parametrize("name", SHORT)
def test_a_short_attack_harms_no_other_client(platform: Platform, name: str) -> None:
    survives(platform, name, 2.0, 0.0, WORST_SHORT_S)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_harms_no_other_client(platform: Platform, name: str) -> None:
    survives(platform, name, ATTACKS[name].seconds, 10.0, WORST_S)
