"""One run: start the platform, load it, break it, let it recover, and settle the accounts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tests.chaos import broker, report
from tests.chaos.conductor import Conductor
from tests.chaos.fleet import Fleet
from tests.chaos.http import Connection
from tests.chaos.ledger import Fate, Ledger, Submit, Violation, Way
from tests.chaos.load import SILENCE_S, Load
from tests.chaos.passes import Passes
from tests.chaos.report import Lost, Report
from tests.chaos.schedule import Fault, plan

#: Between two lines of progress, in seconds.
PROGRESS_S = 5.0
#: Answers that are looked at once more at the end.
AUDITED = 500


@dataclass(frozen=True)
class Options:
    """What a run is like."""

    seconds: float = 600.0
    #: Submits in a second.
    rate: float = 300.0
    #: Of the schedule.
    seed: int = 7
    workers: int = 2
    #: INFERNO_BROKER__URL; a bare scheme means the run's own Redis, None leaves it unset.
    broker: str | None = None
    #: Of Redis' append-only file.
    fsync: Literal["always", "everysec", "no"] = "always"
    faults: tuple[Fault, ...] = tuple(Fault)
    #: Shortest and longest time between two faults, in seconds.
    gap_s: tuple[float, float] = (2.5, 6.0)
    #: Shortest and longest pause of a stopped worker, in seconds.
    pause_s: tuple[float, float] = (1.0, 15.0)
    #: Shortest and longest forward pass.
    pass_ms: tuple[float, float] = (5.0, 40.0)
    #: How long nothing may be answered before what is missing counts as lost, in seconds.
    patience_s: float = 60.0


def run(options: Options, folder: Path, say: Callable[[str], None]) -> Report:
    """Run, and return what was seen.

    Args:
      options: what to do.
      folder: empty; for the platform's files and logs.
      say: is told of the progress.
    """
    with Fleet(
        folder,
        workers=options.workers,
        broker=options.broker,
        fsync=options.fsync,
        pass_ms=options.pass_ms,
    ) as fleet:
        passes = Passes(fleet.passes)
        try:
            return Run(options, fleet, passes, say).result()
        finally:
            passes.close()


class Run:
    """A run on a platform that serves."""

    def __init__(
        self, options: Options, fleet: Fleet, passes: Passes, say: Callable[[str], None]
    ) -> None:
        """Prepare the clients and the faults."""
        self._options = options
        self._fleet = fleet
        self._passes = passes
        self._say = say
        self._ledger = Ledger()
        self._load = Load(fleet.port, self._ledger, options.rate)
        self._conductor = Conductor(fleet, self._ledger, passes)
        self._began_at = time.monotonic()
        self._said_at = 0.0

    def result(self) -> Report:
        """Do everything, and report."""
        self._began_at = time.monotonic()
        self._load.start()
        try:
            self._break()
            seconds = time.monotonic() - self._began_at
            self._load.end()
            self._conductor.heal()
            self._await_answers()
        finally:
            self._load.close()
        return self._report(seconds)

    def _break(self) -> None:
        options = self._options
        actions = plan(
            options.seconds,
            options.seed,
            faults=options.faults,
            gap_s=options.gap_s,
            pause_s=options.pause_s,
        )
        for action in actions:
            self._wait_until(self._began_at + action.at)
            self._conductor.carry_out(action)
        self._wait_until(self._began_at + options.seconds)

    def _await_answers(self) -> None:
        while self._ledger.pending:
            since = max(self._conductor.disturbed_at, self._ledger.progressed_at)
            if time.monotonic() - since > self._options.patience_s:
                return
            self._wait_until(time.monotonic() + 0.1)

    def _wait_until(self, at: float) -> None:
        while (remaining_s := at - time.monotonic()) > 0:
            time.sleep(min(remaining_s, 0.2))
            if time.monotonic() - self._said_at >= PROGRESS_S:
                self._said_at = time.monotonic()
                self._say(self._progress())

    def _progress(self) -> str:
        ledger, conductor = self._ledger, self._conductor
        faults = ", ".join(f"{fault} {count}" for fault, count in conductor.done.items())
        return (
            f"{time.monotonic() - self._began_at:5.0f} s  accepted {ledger.fates[Fate.ACCEPTED]}"
            f"  answered {ledger.answered}  pending {ledger.pending}"
            f"  refused {ledger.fates[Fate.REFUSED]}  unknown {ledger.fates[Fate.UNKNOWN]}"
            f"  working {len(self._fleet.working())}  {faults}"
        )

    def _report(self, seconds: float) -> Report:
        ledger, conductor, passes = self._ledger, self._conductor, self._passes
        unpushed = self._look_again()
        passes.read()
        return Report(
            options=asdict(self._options),
            seconds=seconds,
            accepted=ledger.fates[Fate.ACCEPTED],
            refused=ledger.fates[Fate.REFUSED],
            refusals=dict(ledger.refusals),
            unknown=ledger.fates[Fate.UNKNOWN],
            answered=ledger.answered,
            lost=self._lost(),
            duplicates=ledger.duplicates,
            wrong=ledger.wrong,
            unpushed=unpushed,
            passes=report.histogram(passes),
            finished_twice=sum(count > 1 for count in passes.ends.values()),
            refused_that_ran=report.runs(ledger, passes, Fate.REFUSED),
            unknown_that_ran=report.runs(ledger, passes, Fate.UNKNOWN),
            actions=report.counts(conductor.done),
            skipped=report.counts(conductor.skipped),
            kills=conductor.kills,
            recovery=report.recovery(conductor.kills, passes),
            stale_settles=broker.stale_settles(self._fleet.redis),
            surprises=self._fleet.surprises,
        )

    def _look_again(self) -> list[Violation]:
        """Poll for what is missing, and for some answers whether they are still the same.

        Returns:
          The answers that had not been pushed to those who waited for them.
        """
        missing = self._ledger.unanswered()
        unpushed = [
            Violation(submit.text, submit.task_id, "stored, but not pushed")
            for submit in missing
            if self._load.collector.look(submit.task_id) and submit.way is Way.SOCKET
        ]
        answered = [s for s in self._ledger.submits.values() if s.content]
        chance = random.Random(self._options.seed)
        for submit in chance.sample(answered, min(AUDITED, len(answered))):
            if not self._load.collector.look(submit.task_id):
                what = "was answered, and is not over any more"
                self._ledger.wrong.append(Violation(submit.text, submit.task_id, what))
        return unpushed

    def _lost(self) -> list[Lost]:
        kept = broker.kept(self._fleet.redis)
        return [self._describe(submit, kept) for submit in self._ledger.unanswered()]

    def _describe(self, submit: Submit, kept: set[str]) -> Lost:
        connection = Connection(self._fleet.port, SILENCE_S)
        status, view = connection.call("GET", f"/tasks/{submit.task_id}")
        connection.close()
        return Lost(
            text=submit.text,
            task_id=submit.task_id,
            way=submit.way,
            sent_at_s=round(submit.sent_at - self._began_at, 3),
            status=view["status"] if status == 200 else view["code"],
            is_kept=submit.task_id in kept,
            passes=len(self._passes.starts.get(submit.text, ())),
        )
