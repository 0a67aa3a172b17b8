"""Speed and exactness of a text model by precision: `python -m bench.precision`.

Each version of `embed` runs in each precision that it supports, in turns. Its engine answers short
sentences without a server, one at a time and in full batches. Its embeddings of the reference texts
are compared with the original model's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import numpy as np

from bench.workloads import Numbers, texts
from inferno.engine.engine import Engine
from inferno.protocol.tensors import Array, Tensors
from inferno.repository.repository import Repository
from inferno.settings import Settings
from inferno.testing.processes import ROOT

#: Version and precision; the first candidate is the reference.
CANDIDATES = ((2, "none"), (1, "none"), (2, "int8"))
REFERENCE = ROOT / "models" / "embed" / "reference.npz"


@dataclass(frozen=True)
class Figures:
    """The results of one version in one precision."""

    version: int
    quantize: str
    artifact_bytes: int
    memory_bytes: int
    #: Median time of a lone text, in ms.
    alone_ms: float
    #: Texts a second, in full batches.
    batched_per_s: float
    #: Lowest cosine to the original model's embeddings, of lone texts.
    cosine: float
    #: Lowest cosine between a text alone and in a batch.
    batched_cosine: float


class Candidate:
    """One engine and its measurements."""

    def __init__(self, version: int, quantize: str, threads: int) -> None:
        """Load the engine."""
        settings = Settings(inference={"device": "cpu", "threads": threads, "quantize": quantize})
        package = Repository.read(settings.repository).model("embed").package(version)
        self.version, self.quantize = version, quantize
        self.artifact_bytes = (package.path / str(package.manifest.artifact)).stat().st_size
        self.engine = Engine(package, settings.batching, settings.inference)
        self.engine.warm_up()
        self._asked = texts(Numbers.RANGE)
        self._alone_s: list[float] = []
        self._batch_s: list[float] = []

    def measure(self, seconds: float) -> None:
        """Answer texts one at a time for half of the time, and in batches for the other half."""
        for rows, took in ((1, self._alone_s), (self.engine.max_batch_size, self._batch_s)):
            end = time.perf_counter() + seconds / 2
            while (began := time.perf_counter()) < end:
                self._answer(list(islice(self._asked, rows)))
                took.append(time.perf_counter() - began)

    def _answer(self, asked: Sequence[str]) -> Array:
        members: list[Tensors] = [{"text": np.array([text], object)} for text in asked]
        answers = self.engine.forward([self.engine.prepare(member) for member in members])
        return np.concatenate([answer["embedding"] for answer in answers])

    def figures(self) -> Figures:
        """Return the measurements, and how exact the embeddings are."""
        reference = np.load(REFERENCE)
        asked = reference["texts"].tolist()
        alone = np.concatenate([self._answer([text]) for text in asked])
        size = self.engine.max_batch_size
        parts = [asked[n : n + size] for n in range(0, len(asked), size)]
        together = np.concatenate([self._answer(part) for part in parts])
        return Figures(
            version=self.version,
            quantize=self.quantize,
            artifact_bytes=self.artifact_bytes,
            memory_bytes=self.engine.memory_bytes,
            alone_ms=median(self._alone_s) * 1000,
            batched_per_s=size / median(self._batch_s),
            cosine=float((alone * reference["embeddings"]).sum(axis=1).min()),
            batched_cosine=float((alone * together).sum(axis=1).min()),
        )


def table(figures: Sequence[Figures]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| `embed` | on disk | in memory | one text | in batches | cosine to the original "
        "| batched to alone |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| version {f.version}, quantize: {f.quantize} | {f.artifact_bytes / 1e6:.0f} MB "
        f"| {f.memory_bytes / 1e6:.0f} MB | {f.alone_ms:.1f} ms | {f.batched_per_s:.0f}/s "
        f"| {f.cosine:.4f} | {f.batched_cosine:.4f} |"
        for f in figures
    ]
    return "\n".join(rows)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    candidates = [Candidate(*each, options.threads) for each in CANDIDATES]
    for _ in range(options.turns):
        for candidate in candidates:
            candidate.measure(options.seconds)
    print(table([candidate.figures() for candidate in candidates]))


if __name__ == "__main__":
    main()
