"""The URL at which this machine reaches the platform."""

from __future__ import annotations

from typing import Any

import pytest

from inferno.operate.addresses import local_url
from inferno.settings import Settings

TLS = {"certfile": "inferno.crt", "keyfile": "inferno.key"}


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 80}, "http://127.0.0.1:80"),
        ({"host": "::1"}, "http://[::1]:8000"),
        ({"hosts": ["inferno.example"]}, "http://127.0.0.1:8000"),
        (TLS, "https://127.0.0.1:8000"),
        # Certificates are for names.
        (TLS | {"hosts": ["inferno.example", "other"]}, "https://inferno.example:8000"),
        (TLS | {"hosts": ["*"]}, "https://127.0.0.1:8000"),
    ],
)
def test_local_url(server: dict[str, Any], url: str) -> None:
    assert local_url(Settings.model_validate({"server": server})) == url
