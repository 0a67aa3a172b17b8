"""Run attacks on a platform and print what a bystander and the processes have seen of each."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.attacks.attacks import ATTACKS
from tests.attacks.target import attacked_platform
from tests.attacks.trial import Outcome, run

#: Waits in milliseconds; memory before, at its peak and after, in megabytes.
HEAD = (
    "| attack | wait, kept connection | wait, new connections | calls | errors | died"
    " | memory of web | of workers | of Redis | findings |"
)


def main() -> int:
    """Run what the command line asks for; returns 1 if a bystander was harmed."""
    options = _options()
    names = options.names or list(ATTACKS)
    if unknown := set(names) - set(ATTACKS):
        sys.exit(f"Error: no attack {', '.join(sorted(unknown))}; there are: {', '.join(ATTACKS)}")
    if options.list:
        print("\n".join(f"{name:26} {ATTACKS[name].about}" for name in names))
        return 0
    outcomes = []
    if not options.json:
        print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}", flush=True)
    with _target(options) as (url, pid):
        for name in names:
            attack = ATTACKS[name]
            seconds = options.seconds or attack.seconds
            outcomes.append(run(attack, url, pid, seconds, options.after))
            if not options.json:
                print(_row(outcomes[-1]), flush=True)
    if options.json:
        print(json.dumps([outcome.document() for outcome in outcomes], indent=2))
    harmed = [one for one in outcomes if one.errors or one.died or one.worst_s > 1]
    return 1 if harmed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="attacks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="only list the attacks")
    parser.add_argument("--url", help="of a running platform (default: start one)")
    parser.add_argument("--pid", type=int, help="of its `inferno up`")
    parser.add_argument("--seconds", type=float, help="longest time of each attack")
    parser.add_argument("--after", type=float, default=10.0, help="seconds of rest after each")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if (options.url is None) != (options.pid is None):
        parser.error("--url and --pid go together")
    return options


@contextmanager
def _target(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield the URL of the platform and the pid of its supervisor."""
    if options.url is not None:
        yield options.url, options.pid
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        attacked_platform(Path(folder)) as platform,
    ):
        yield platform.url, platform.popen.pid


def _row(outcome: Outcome) -> str:
    columns = (
        f"`{outcome.attack}`",
        f"{outcome.kept.worst_s * 1000:.0f}",
        f"{outcome.fresh.worst_s * 1000:.0f}",
        outcome.kept.calls + outcome.fresh.calls,
        _counted(outcome.errors),
        _counted(outcome.died),
        *(_memory(outcome, name) for name in ("web", "worker", "redis")),
        _counted(outcome.findings),
    )
    return f"| {' | '.join(map(str, columns))} |"


def _memory(outcome: Outcome, kind: str) -> str:
    """Return the memory of all processes of a kind together."""
    used = [process for process in outcome.memory if process.name.split()[0] == kind]
    sums = (sum(one.before for one in used), sum(one.peak for one in used))
    return " / ".join(map(str, (*sums, sum(one.after for one in used))))


def _counted(words: list[str]) -> str:
    """Return `3 x one, other`, or `-` for nothing."""
    counts = Counter(words).items()
    return ", ".join(word if count == 1 else f"{count} x {word}" for word, count in counts) or "-"


if __name__ == "__main__":
    sys.exit(main())
