"""What a run has shown: the two ledgers, compared."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.conductor import Kill
from tests.chaos.ledger import Fate, Ledger, Violation
from tests.chaos.passes import Passes
from tests.chaos.schedule import Fault


@dataclass(frozen=True)
class Recovery:
    """How long unsettled tasks of killed workers waited for their next pass, in seconds."""

    count: int
    #: None when there were none.
    median_s: float | None
    p95_s: float | None
    most_s: float | None
    #: Tasks that were never run again.
    never: int


@dataclass(frozen=True)
class Lost:
    """A task that was accepted and never answered."""

    text: str
    task_id: str
    way: str
    #: Seconds since the load began.
    sent_at_s: float
    #: What the platform says of it at the end: a task's status, or a problem's code.
    status: str
    #: Whether the broker still counts it as held by a worker.
    is_kept: bool
    passes: int


@dataclass(frozen=True)
class Report:
    """The figures of one run."""

    options: dict[str, Any]
    #: How long clients submitted, in seconds.
    seconds: float
    accepted: int
    refused: int
    refusals: dict[str, int]
    unknown: int
    answered: int
    lost: list[Lost]
    duplicates: list[Violation]
    wrong: list[Violation]
    #: Answers that were there to be polled, and were not pushed to a socket that waited.
    unpushed: list[Violation]
    #: Tasks by the number of forward passes that were started with them.
    passes: dict[int, int]
    #: Tasks that more than one pass came to its end with.
    finished_twice: int
    #: Tasks that were run though their submit was refused, or its answer was never seen.
    refused_that_ran: int
    unknown_that_ran: int
    actions: dict[str, int]
    skipped: dict[str, int]
    kills: list[Kill]
    recovery: Recovery
    #: Outcomes of workers that had lost their tasks, fenced off.
    stale_settles: int
    surprises: list[str]

    @property
    def is_clean(self) -> bool:
        """Whether every promise was kept."""
        return not (self.lost or self.duplicates or self.wrong or self.unpushed)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON's own kinds."""
        return asdict(self) | {"is_clean": self.is_clean}

    def table(self) -> str:
        """Return the report for people."""
        kept = sum(lost.is_kept for lost in self.lost)
        holding = sum(kill.hit is not None for kill in self.kills)
        recovery = self.recovery
        rows = {
            "submitted": f"{self.accepted + self.refused + self.unknown} in {self.seconds:.0f} s",
            "accepted": self.accepted,
            "refused": f"{self.refused} {_counts(self.refusals)}",
            "unknown": f"{self.unknown}, of which {self.unknown_that_ran} ran",
            "refused that ran": self.refused_that_ran,
            "answered": self.answered,
            "LOST": f"{len(self.lost)}, of which the broker still holds {kept}",
            "DUPLICATES": len(self.duplicates),
            "WRONG": len(self.wrong),
            "UNPUSHED": len(self.unpushed),
            "forward passes": _counts(self.passes) + f"; {self.finished_twice} finished twice",
            "faults": _counts(self.actions),
            "without a target": _counts(self.skipped) or "none",
            "workers killed": (
                f"{len(self.kills)}, of which {holding} held tasks; {_counts(stages(self.kills))}"
            ),
            "run again after": (
                f"median {recovery.median_s:.2f} s, p95 {recovery.p95_s:.2f} s, "
                f"at most {recovery.most_s:.2f} s ({recovery.count} tasks)"
                if recovery.median_s is not None
                else "no task was"
            )
            + f"; never: {recovery.never}",
            "stale settles fenced": self.stale_settles,
            "surprises": ", ".join(self.surprises) or "none",
            "verdict": "every promise kept" if self.is_clean else "PROMISES BROKEN",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def runs(ledger: Ledger, passes: Passes, fate: Fate) -> int:
    """Return how many tasks were run of those whose submit had a fate."""
    return sum(s.fate is fate and s.text in passes.starts for s in ledger.submits.values())


def histogram(passes: Passes) -> dict[int, int]:
    """Return how many tasks were in one forward pass, in two, and so on."""
    return dict(sorted(Counter(map(len, passes.starts.values())).items()))


def recovery(kills: Sequence[Kill], passes: Passes) -> Recovery:
    """Measure from each kill to the next pass, elsewhere, of what the worker had not settled."""
    times = []
    never = 0
    for kill in kills:
        for text in kill.unsettled:
            at = passes.next_start(text, kill.at, kill.pid)
            if at is None:
                never += 1
            else:
                times.append(at - kill.at)
    if not times:
        return Recovery(0, None, None, None, never)
    p95_s = statistics.quantiles(times, n=20, method="inclusive")[-1] if times[1:] else times[0]
    return Recovery(len(times), statistics.median(times), p95_s, max(times), never)


def stages(kills: Sequence[Kill]) -> dict[str, int]:
    """Count kills by the stage that they hit.

    "idle" are those whose workers held nothing, "unknown" those of which the broker cannot tell.
    """
    return dict(Counter(kill.hit or ("unknown" if kill.held is None else "idle") for kill in kills))


def counts(faults: Mapping[Fault, int]) -> dict[str, int]:
    """Return the counts by plain text."""
    return {str(fault): count for fault, count in faults.items()}


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())
