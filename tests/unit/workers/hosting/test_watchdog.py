"""The watchdog. Each test runs a process of its own, because the watchdog ends it."""

import os
import subprocess
import sys

from inferno.testing.processes import ROOT

PREPARE = """
import ctypes, logging, re, threading, time
from workers.hosting.watchdog import Watchdog

logging.basicConfig()
watchdog = Watchdog(grace_s=1.5)
watchdog.start()

def match_for_ever():
    re.match(r"(a+)+$", "a" * 60 + "b")

def hold_the_lock(seconds):
    ctypes.PyDLL(None).sleep(seconds)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code after PREPARE in a process, until the code or the watchdog ends it."""
    return subprocess.run(
        [sys.executable, "-c", PREPARE + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_pass_that_hangs_ends_the_process_and_is_named() -> None:
    done = run("""
def fall_asleep():
    time.sleep(600)

with watchdog.watch("a forward pass of sleepy", 0.5):
    fall_asleep()
""")

    assert done.returncode == os.EX_SOFTWARE
    assert "a forward pass of sleepy has not ended within its limit of 0.5 s" in done.stderr
    assert "INFERNO_INFERENCE__TIMEOUT_S" in done.stderr
    assert "in fall_asleep" in done.stderr, "the stack of what hangs"
    assert "Timeout (" not in done.stderr


def test_pass_that_never_releases_the_interpreter_ends_the_process() -> None:
    done = run("""
with watchdog.watch("a forward pass of greedy", 0.5):
    match_for_ever()
""")

    assert done.returncode == 1
    assert done.stderr.startswith("Timeout (0:00:03")
    assert "in match_for_ever" in done.stderr


def test_pass_that_locks_the_interpreter_right_after_another_ends_the_process() -> None:
    # The timer was set for the first pass, or has just been cancelled because it was over.
    done = run("""
with watchdog.watch("a pass in time", 0.5):
    pass
while watchdog._ends_at:
    pass
with watchdog.watch("a pass in time", 0.5):
    pass
with watchdog.watch("a forward pass of greedy", 2):
    hold_the_lock(600)
""")

    assert done.returncode == 1
    assert "in hold_the_lock" in done.stderr


def test_passes_in_time_leave_the_process_alone() -> None:
    # The first limit with its grace, 3.5 s, ends while nothing or another pass is watched.
    done = run("""
with watchdog.watch("short", 0.5):
    pass
end = time.monotonic() + 4
time.sleep(1.5)
while time.monotonic() < end:
    with watchdog.watch("one of many", 0.5):
        time.sleep(0.01)
with watchdog.watch("long", 60):
    time.sleep(0.5)
print("still there")
""")

    assert (done.returncode, done.stdout, done.stderr) == (0, "still there\n", "")


def test_only_the_pass_over_its_own_limit_is_named() -> None:
    done = run("""
def work(what, limit_s):
    with watchdog.watch(what, limit_s):
        time.sleep(600)

for what, limit_s in (("patient", 300), ("strict", 0.5)):
    threading.Thread(target=work, args=(what, limit_s)).start()
""")

    assert done.returncode == os.EX_SOFTWARE
    assert "strict has not ended within its limit of 0.5 s" in done.stderr
    assert "patient" not in done.stderr


def test_longer_limit_of_a_pass_that_locks_the_interpreter_counts() -> None:
    # The timer that was set for the short limit must not end a pass with a longer one.
    done = run("""
with watchdog.watch("short", 0.1):
    pass
with watchdog.watch("long", 60):
    hold_the_lock(5)
print("still there")
""")

    assert (done.returncode, done.stdout, done.stderr) == (0, "still there\n", "")


def test_blocked_log_does_not_keep_the_process() -> None:
    done = run("""
class Blocked(logging.Handler):
    def emit(self, record):
        time.sleep(600)

logging.getLogger().addHandler(Blocked())
with watchdog.watch("sleepy", 0.5):
    time.sleep(600)
""")

    assert done.returncode == 1
    assert "sleepy has not ended" in done.stderr
    assert "Timeout (" in done.stderr


def test_exception_of_a_pass_comes_through_and_ends_its_watch() -> None:
    done = run("""
try:
    with watchdog.watch("failing", 0.5):
        raise ValueError("no")
except ValueError as exc:
    print(exc)
time.sleep(4)
""")

    assert (done.returncode, done.stdout, done.stderr) == (0, "no\n", "")
