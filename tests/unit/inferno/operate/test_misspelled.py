"""Which environment variables are taken for misspelled settings."""

from __future__ import annotations

import pytest

from inferno.operate.misspelled import misspelled
from inferno.operate.settings_document import documented_settings


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("INFERNO_SERVER__HOST_NAMES", "INFERNO_SERVER__HOSTS"),
        ("INFERNO_SERVERS__PORT", "INFERNO_SERVER__PORT"),
        ("INFERNO_SERVER_PORT", "INFERNO_SERVER__PORT"),
        ("INFERNO_LIMITS__MAX_BODY", "INFERNO_LIMITS__MAX_BODY_BYTES"),
    ],
)
def test_the_nearest_setting_is_named(name: str, meant: str) -> None:
    assert list(misspelled([name])) == [
        f"{name} is not a setting and has no effect; did you mean {meant}?"
    ]


def test_names_without_a_near_one_are_found_too() -> None:
    assert list(misspelled(["INFERNO_QUOTAS__OF_TENANTS"])) == [
        "INFERNO_QUOTAS__OF_TENANTS is not a setting and has no effect"
    ]


def test_settings_and_names_of_others_are_none() -> None:
    names = [setting.variable for setting in documented_settings()]
    names += ["PATH", "INFERNO_HOME", "MY_INFERNO_SERVER__PORT", "inferno_server__port"]
    names += ["INFERNO_SERVER", "INFERNO_REPOSITORY__ACTIVE__EMBED"]
    names += ["INFERNO_BATCHING__MAX_BATCH_WAIT_MS"]
    assert list(misspelled(names)) == []
