"""The command line: `python -m tests.fuzz --seconds 600 --seed 7`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.campaign import Options, run
from tests.fuzz.target import target


def main() -> int:
    """Run; return 1 when a rule was broken."""
    arguments = _parser().parse_args()
    options = Options(
        seconds=arguments.seconds, seed=arguments.seed, only=arguments.case, cases=arguments.cases
    )
    with _platform(arguments) as (url, pid):
        report = run(url, pid, options, lambda line: print(line, flush=True))
    print(f"\n{report}")
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
        for fault in report.faults:
            path = arguments.save / f"{report.seed}-{fault.number}.bin"
            path.write_bytes(b"".join(fault.case.pieces))
    return 1 if report.faults or report.broken() else 0


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--seconds",
        type=float,
        default=default.seconds,
        help="how long it runs (default: %(default)g)",
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="chooses the cases (default: %(default)d)"
    )
    parser.add_argument("--case", type=int, help="run only the case with this number")
    parser.add_argument(
        "--cases",
        type=int,
        default=default.cases,
        help="end after this many cases, even before the time is over",
    )
    parser.add_argument("--url", help="URL of a running platform; by default, one is started")
    parser.add_argument(
        "--pid", type=int, help="process id of that platform's `inferno up`; needed with --url"
    )
    parser.add_argument(
        "--save", type=Path, help="folder in which the bytes of each failing case are kept"
    )
    return parser


@contextmanager
def _platform(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    if arguments.url:
        yield arguments.url.rstrip("/"), arguments.pid
        return
    with (
        tempfile.TemporaryDirectory(prefix="inferno-fuzz-") as folder,
        target(Path(folder)) as platform,
    ):
        yield platform.url, platform.popen.pid


if __name__ == "__main__":
    sys.exit(main())
