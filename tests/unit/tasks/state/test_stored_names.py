"""Names of stored fields that differ from those in the code: older processes read them."""

from __future__ import annotations

import msgspec

from tasks.state.cluster import HeldVersion
from tasks.state.deployments import Deployment


def test_a_deployment_keeps_its_stored_names():
    deployment = Deployment(weights={1: 2.0}, pinned=True, load_generations={1: 3})
    stored = {"shares": {"1": 2.0}, "fixed": True, "asked": {"1": 3}}
    assert msgspec.json.decode(msgspec.json.encode(deployment)) == stored


def test_a_report_of_a_version_keeps_its_stored_names():
    held = HeldVersion("ready", load_generation=3)
    assert msgspec.to_builtins(held) == {"state": "ready", "asked": 3}
