"""Closed-loop load over HTTP by wrk, which takes little of the machine that it shares."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.load import CACHED, Load
from bench.targets import Service
from bench.workloads import MARK, NUMBERED, SPREAD, Numbers, sentences

SCRIPT = Path(__file__).with_name("wrk.lua")
INSTALL_HINT = "wrk is missing; install it: apt-get install wrk"

#: Limit of one call, in seconds; a longer one is an error.
PATIENCE_S = 10
#: Placeholder of the text, at which a body is split.
_PLACE = "@@"


class WrkMissing(Exception):
    """wrk is not installed."""


class WrkFailed(Exception):
    """wrk ended without a result; the message has its output."""


def run(
    service: Service, *, connections: int, seconds: int, first: int, different: int = Numbers.RANGE
) -> Load:
    """Keep connections busy.

    Args:
      service: service to call.
      connections: number of connections, each with one request under way.
      seconds: length of the load.
      first: number of the first text.
      different: number of different texts, which are sent in turn (default: no text comes twice).
    Raises:
      WrkMissing: wrk is not installed.
      WrkFailed: wrk printed no result.
    """
    program = shutil.which("wrk")
    if program is None:
        raise WrkMissing(INSTALL_HINT)
    head, tail = service.body([_PLACE]).decode().split(_PLACE)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(sentences()) + "\n")
        file.flush()
        options = ["-t", "1", "-c", str(connections), "-d", f"{seconds}s"]
        options += ["--timeout", f"{PATIENCE_S}s", "-s", str(SCRIPT)]
        arguments = [service.path, str(first), head, tail, service.marker]
        arguments += ["echoes" if service.echoes else "-", file.name, str(different)]
        arguments += [CACHED.decode(), MARK, str(SPREAD), str(NUMBERED)]
        url = f"http://127.0.0.1:{service.port}"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            done = subprocess.run(
                [program, *options, url, "--", *arguments],
                capture_output=True,
                text=True,
                timeout=seconds + 3 * PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise WrkFailed(f"wrk did not end within {exc.timeout:g} s") from exc
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    load = parse(done.stdout + done.stderr)
    load.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return load


def parse(output: str) -> Load:
    """Parse the output of wrk and its script.

    Raises:
      WrkFailed: the output has no result.
    """
    found = re.search(r"^result (\{.*\})$", output, re.MULTILINE)
    if found is None:
        raise WrkFailed(f"wrk printed no result: {output.strip()[-500:]}")
    values = json.loads(found[1])
    sample = re.search(r"^sample (.+)$", output, re.MULTILINE)
    kinds = ("refused", "wrong", "connect", "read", "write", "timeout")
    return Load(
        seconds=values["seconds"],
        answered=values["answered"],
        latency_ms={name: values[name] for name in ("p50", "p90", "p95", "p99", "max")},
        errors={kind: values[kind] for kind in kinds if values[kind]},
        mean_batch=values["sized"] / values["passes"] if values["passes"] else None,
        sample=sample[1] if sample else None,
        cached=values["cached"],
    )
