"""That none of a target's processes gets out of sight."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.processes import Process, cpu_s, kind_of, rss_bytes
from inferno.testing.processes import ROOT

#: Starts a process whose parent ends, so that nobody else would know of it.
ORPHAN = """
import subprocess, sys, time
from bench import processes
from inferno.testing.processes import wait_until
processes.adopt_orphans()
sleep = "import time; time.sleep(600)"
start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}])"
subprocess.run([sys.executable, "-c", start], check=True)
assert wait_until(lambda: len(processes.snapshot()) == 1)
processes.GRACE_S = 0.2
killed = processes.end_what_is_left()
assert processes.snapshot() == {}
print(killed)
"""


def test_a_process_whose_parent_has_ended_is_found_and_ended():
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "time.sleep(600)" in done.stdout


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("/usr/bin/redis-server 127.0.0.1:40001", "redis"),
        ("python .venv/bin/gunicorn --config web/gunicorn_conf.py web.app:create_app()", "web"),
        ("python .venv/bin/celery -A tasks worker -Q echo -n echo-$@%h", "worker"),
        ("python .venv/bin/celery -A tasks worker -Q webhooks -c 64", "webhooks"),
        ("python .venv/bin/celery -A tasks flower --conf=monitoring/flower_conf.py", "flower"),
        ("python -m inferno up --models echo --no-flower", "supervisor"),
        ("python -m inferno.operate.guard 30.0", "supervisor"),
        ("build/peers/mosec/bin/python bench/peers/mosec/server.py", "server"),
    ],
)
def test_processes_are_told_apart_by_their_command(command, kind):
    assert kind_of(command) == kind


def test_processor_time_is_what_was_added_between_two_moments():
    before = {(1, 0.0): Process("web", 5.0, 10), (2, 0.0): Process("web", 1.0, 10)}
    after = {
        (1, 0.0): Process("web", 6.0, 20),
        (2, 0.0): Process("web", 1.5, 30),
        # The same id, and another process.
        (2, 9.0): Process("redis", 0.25, 40),
    }
    assert cpu_s(before, after) == {"web": 1.5, "redis": 0.25}
    assert rss_bytes(after) == {"web": 50, "redis": 40}
