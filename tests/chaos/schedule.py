"""What happens when: a seeded list of faults."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What is done to the platform."""

    #: SIGKILL a worker, at a chosen stage of its work.
    SIGKILL = "sigkill"
    #: SIGTERM a worker, which drains.
    SIGTERM = "sigterm"
    #: SIGSTOP a worker, and SIGCONT it later.
    SIGSTOP = "sigstop"
    #: SIGKILL a web process.
    WEB_KILL = "web-kill"
    #: SIGKILL Redis, and start it again on its files.
    REDIS_RESTART = "redis-restart"
    #: Have Redis close connections of the platform.
    CUT = "cut"


class Stage(StrEnum):
    """What a worker is doing with the tasks it holds."""

    #: It has just been given some.
    FETCH = "fetch"
    #: They wait for a pass.
    BUFFER = "buffer"
    #: They are in a pass.
    FORWARD = "forward"
    #: Their pass is over, and their outcomes are not stored yet.
    SETTLE = "settle"


#: How often each fault is chosen.
WEIGHTS = {
    Fault.SIGKILL: 50,
    Fault.SIGTERM: 8,
    Fault.SIGSTOP: 10,
    Fault.WEB_KILL: 10,
    Fault.REDIS_RESTART: 7,
    Fault.CUT: 15,
}
#: How often each stage is aimed at.
STAGES = {Stage.FORWARD: 35, Stage.SETTLE: 25, Stage.BUFFER: 20, Stage.FETCH: 20}

#: Time before the first fault and after the last, in which nothing is wrong, in seconds.
QUIET_S = 2.0


@dataclass(frozen=True)
class Action:
    """One fault of a run."""

    #: Seconds since the load began.
    at: float
    fault: Fault
    #: For SIGKILL.
    stage: Stage
    #: How long a pause or an outage lasts, in seconds.
    lasts_s: float
    #: For CUT: the connections' type as CLIENT KILL names it, and the share of them.
    kind: str
    share: float
    #: Chooses among workers and web processes that are equally fit.
    lot: float


def plan(
    seconds: float,
    seed: int,
    *,
    faults: Collection[Fault] = tuple(Fault),
    gap_s: tuple[float, float] = (2.5, 6.0),
    pause_s: tuple[float, float] = (1.0, 15.0),
) -> list[Action]:
    """Return the faults of a run, in order.

    Args:
      seconds: length of the run.
      seed: of all chances; the same seed gives the same list.
      faults: those that may happen.
      gap_s: shortest and longest time between two.
      pause_s: shortest and longest pause of a stopped worker.
    """
    chance = random.Random(seed)
    allowed = {fault: weight for fault, weight in WEIGHTS.items() if fault in faults}
    actions = []
    at = QUIET_S
    while at < seconds - QUIET_S:
        fault = chance.choices(list(allowed), list(allowed.values()))[0]
        lasts_s = chance.uniform(*pause_s) if fault is Fault.SIGSTOP else chance.uniform(0.1, 2.0)
        actions.append(
            Action(
                at=at,
                fault=fault,
                stage=chance.choices(list(STAGES), list(STAGES.values()))[0],
                lasts_s=lasts_s,
                kind=chance.choice(("normal", "pubsub")),
                share=chance.choice((0.3, 1.0)),
                lot=chance.random(),
            )
        )
        at += chance.uniform(*gap_s)
    return actions
