"""The command line: `python -m bench.scenarios crowd --out DIR`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from bench.scenarios import drawings, plots
except ImportError as exc:
    sys.exit(f"{exc}: install it with `pip install -r bench/requirements.txt`")
from bench.scenarios import crowd, latency, pressure, retries

Document = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """One question, the module that answers it, and the function that draws the answer."""

    module: ModuleType
    draw: Callable[[Document, Any], None]
    height_in: float

    def run(self, name: str, out: Path) -> None:
        """Measure, print the answer, and write the data and the plot."""
        print(self.module.QUESTION, flush=True)
        with tempfile.TemporaryDirectory(prefix=f"inferno-{name}-") as folder:
            document = self.module.measure(Path(folder))
        finding, *details = self.module.answer(document)
        print(f"  {finding}", *details, sep="\n  ", flush=True)
        files = [out / f"{name}.{kind}" for kind in ("svg", "png")]
        draw = partial(self.draw, document)
        plots.save(files, self.module.QUESTION, finding, draw, self.height_in)
        data = out / f"{name}.json"
        data.write_text(json.dumps({"answer": [finding, *details], **document}) + "\n")
        print(f"  -> {', '.join(map(str, [*files, data]))}\n", flush=True)


SCENARIOS = {
    "crowd": Scenario(crowd, drawings.crowd, 5.0),
    "latency": Scenario(latency, drawings.latency, 5.4),
    "retries": Scenario(retries, drawings.retries, 5.6),
    "pressure": Scenario(pressure, drawings.pressure, 8.0),
}


def main() -> None:
    """Run the chosen scenarios, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench.scenarios", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"any of {', '.join(SCENARIOS)} (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/scenarios"),
        help="directory for plots and data (default: %(default)s)",
    )
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in SCENARIOS:
            parser.error(f"{name}: expected one of {', '.join(SCENARIOS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or SCENARIOS:
        SCENARIOS[name].run(name, arguments.out)


if __name__ == "__main__":
    main()
