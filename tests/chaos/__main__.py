"""The command line: `python -m tests.chaos --seconds 60 --only sigkill --report chaos.json`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import Options, run
from tests.chaos.schedule import Fault


def main() -> int:
    """Run; return 1 when a promise was broken."""
    arguments = _parser().parse_args()
    # So that an end from outside cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # The clients' threads shall not make the one that aims at a stage miss it.
    sys.setswitchinterval(0.0002)
    folder = Path(tempfile.mkdtemp(prefix="inferno-chaos-"))
    is_clean = False
    try:
        report = run(_options(arguments), folder, lambda line: print(line, flush=True))
        is_clean = report.is_clean
        print(f"\n{report.table()}")
        if arguments.report is not None:
            arguments.report.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    finally:
        if is_clean:
            shutil.rmtree(folder)
        else:
            print(f"\nThe logs are in {folder}", file=sys.stderr)
    return 0 if is_clean else 1


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--rate", type=float, default=default.rate, help="submits in a second")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the schedule")
    parser.add_argument("--workers", type=int, default=default.workers)
    parser.add_argument(
        "--broker",
        default=os.environ.get("INFERNO_BROKER__URL"),
        help="INFERNO_BROKER__URL; redis:// means lists in the run's own Redis",
    )
    parser.add_argument("--fsync", choices=("always", "everysec"), default=default.fsync)
    parser.add_argument(
        "--only",
        type=lambda text: tuple(map(Fault, text.split(","))),
        default=default.faults,
        metavar="FAULTS",
        help=f"separated by commas, of: {', '.join(Fault)}",
    )
    parser.add_argument("--gap", type=float, nargs=2, default=default.gap_s, help="seconds")
    parser.add_argument("--pause", type=float, nargs=2, default=default.pause_s, help="seconds")
    parser.add_argument("--pass-ms", type=float, nargs=2, default=default.pass_ms)
    parser.add_argument("--patience", type=float, default=default.patience_s, help="seconds")
    parser.add_argument("--report", type=Path, help="file for the report, as JSON")
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        seconds=arguments.seconds,
        rate=arguments.rate,
        seed=arguments.seed,
        workers=arguments.workers,
        broker=arguments.broker,
        fsync=arguments.fsync,
        faults=arguments.only,
        gap_s=tuple(arguments.gap),
        pause_s=tuple(arguments.pause),
        pass_ms=tuple(arguments.pass_ms),
        patience_s=arguments.patience,
    )


if __name__ == "__main__":
    sys.exit(main())
