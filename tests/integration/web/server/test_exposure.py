"""A front end that others than this machine can reach says so when it starts."""

from __future__ import annotations

from inferno.testing.processes import web

WARNING = "The front end listens on 0.0.0.0"


def test_exposed_front_end_warns(redis_url, log):
    with web({"INFERNO_REDIS__URL": redis_url, "INFERNO_SERVER__HOST": "0.0.0.0"}, log):
        assert WARNING in log.read_text()


def test_front_end_on_this_machine_does_not(redis_url, log):
    with web({"INFERNO_REDIS__URL": redis_url}, log):
        assert "listens on" not in log.read_text()
