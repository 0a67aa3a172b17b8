"""A client that does nothing wrong: it calls ten times a second, and says how long it waited.

Run as a process of its own, so that the fuzzer's work does not count as the platform's delay:
`python -m tests.fuzz.bystander URL`. It ends when its standard input does, and prints a summary.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

from inferno.testing.processes import ROOT

INTERVAL_S = 0.1
#: Longest time that a call waits, in seconds.
TIMEOUT_S = 30.0
BODY = json.dumps({"inputs": {"text": "bystander"}, "cache": False}).encode()


@dataclass
class Waits:
    """What the bystander saw."""

    calls: int = 0
    worst_s: float = 0.0
    errors: list[str] = field(default_factory=list)


def call(url: str, waits: Waits) -> None:
    """Run a predict on a new connection, so that all web processes take part."""
    started = time.monotonic()
    try:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
        connection.request("POST", "/v1/models/echo:predict", BODY)
        status = connection.getresponse().status
        connection.close()
        if status != 200:
            waits.errors.append(f"status {status}")
    except (OSError, http.client.HTTPException) as exc:
        waits.errors.append(repr(exc))
    waits.calls += 1
    waits.worst_s = max(waits.worst_s, time.monotonic() - started)


def main() -> None:
    """Call until standard input ends."""
    waits, over = Waits(), threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    while not over.wait(INTERVAL_S):
        call(sys.argv[1], waits)
    print(json.dumps(asdict(waits)))


@contextmanager
def running(url: str) -> Iterator[Waits]:
    """Run a bystander; what it saw is there after the block."""
    waits = Waits()
    command = [sys.executable, "-m", "tests.fuzz.bystander", url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as popen:
        try:
            yield waits
        finally:
            output, _ = popen.communicate()
            waits.__dict__.update(json.loads(output))


if __name__ == "__main__":
    main()
