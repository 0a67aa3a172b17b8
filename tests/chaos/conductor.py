"""Carries out the schedule, and notes what each kill hit."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

import psutil
import redis

from inferno import names
from inferno.protocol.tasks import TERMINAL, TaskState
from inferno.settings import RedisSettings
from tests.chaos import broker
from tests.chaos.fleet import Fleet, Worker
from tests.chaos.ledger import Ledger
from tests.chaos.passes import Passes
from tests.chaos.schedule import Action, Fault, Stage

#: How long a kill waits for a worker at the stage that it aims at, in seconds.
AIM_S = 2.0
#: Between two looks while aiming, in seconds.
LOOK_S = 0.0003
#: So long after a pass, or after it was given a task, a worker has moved on, in milliseconds.
JUST_NOW_MS = 5.0
#: A pass that ended longer ago is settled, in milliseconds.
SETTLING_MS = 1.0


@dataclass(frozen=True)
class Kill:
    """A worker that was killed with SIGKILL."""

    pid: int
    #: Monotonic seconds.
    at: float
    aimed_at: Stage
    #: Where the kill hit, as the books show it afterwards; None when nothing is known to be held.
    hit: Stage | None
    #: How many tasks the worker held; None where the broker cannot tell.
    held: int | None
    #: Tasks that it had run or was running, and that were not over.
    unsettled: tuple[str, ...]


class Conductor:
    """Does to a fleet what a plan says."""

    def __init__(self, fleet: Fleet, ledger: Ledger, passes: Passes) -> None:
        """Store what to break, and where to see what it does."""
        self._fleet = fleet
        self._ledger = ledger
        self._passes = passes
        self.kills: list[Kill] = []
        self.done: Counter[Fault] = Counter()
        #: Actions for which nothing was there to be broken.
        self.skipped: Counter[Fault] = Counter()
        #: When something was broken or healed last; monotonic seconds.
        self.disturbed_at = time.monotonic()
        self._healers: list[Thread] = []
        self._faults: dict[Fault, Callable[[Action], bool]] = {
            Fault.SIGKILL: self._kill,
            Fault.SIGTERM: self._terminate,
            Fault.SIGSTOP: self._pause,
            Fault.WEB_KILL: self._kill_web,
            Fault.REDIS_RESTART: self._restart_redis,
            Fault.CUT: self._cut,
        }

    def carry_out(self, action: Action) -> bool:
        """Do it; return whether there was something to do it to."""
        done = self._faults[action.fault](action)
        (self.done if done else self.skipped)[action.fault] += 1
        self.disturbed_at = time.monotonic()
        return done

    def heal(self) -> None:
        """Wait until everything that was broken works again."""
        for healer in self._healers:
            healer.join()
        try:
            self._fleet.wait_until_healthy()
        except AssertionError as exc:
            # What is lost by it counts all the same.
            self._fleet.surprises.append(str(exc))
        self.disturbed_at = time.monotonic()

    def _kill(self, action: Action) -> bool:
        worker = self._aim(action)
        if worker is None:
            return False
        at = time.monotonic()
        self._fleet.kill(worker)
        self.kills.append(self._assess(worker, at, action.stage))
        return True

    def _aim(self, action: Action) -> Worker | None:
        """Return a worker at the stage that is to be hit, after a while any worker."""
        end = time.monotonic() + AIM_S
        workers = self._fleet.working()
        random.Random(action.lot).shuffle(workers)
        while workers and time.monotonic() < end:
            self._passes.read()
            for worker in workers:
                if self._is_at(worker, action.stage):
                    return worker
            time.sleep(LOOK_S)
        return workers[0] if workers else None

    def _is_at(self, worker: Worker, stage: Stage) -> bool:
        is_running = bool(self._passes.running(worker.pid))
        if is_running or stage is Stage.FORWARD:
            return is_running and stage is Stage.FORWARD
        ended_at, _ = self._passes.finished(worker.pid)
        since_ms = (time.monotonic() - ended_at) * 1000
        if stage is Stage.SETTLE:
            return since_ms < SETTLING_MS
        holding = broker.holding(self._fleet.redis, worker.pid)
        if holding is None:
            # It has settled by now, and is likely to fetch what it has room for.
            return JUST_NOW_MS < since_ms < 4 * JUST_NOW_MS
        is_fresh = holding.youngest_ms < JUST_NOW_MS
        return holding.count > 0 and is_fresh == (stage is Stage.FETCH)

    def _assess(self, worker: Worker, at: float, aimed_at: Stage) -> Kill:
        self._passes.read()
        holding = broker.holding(self._fleet.redis, worker.pid)
        hit: Stage | None = None
        if unsettled := self._passes.running(worker.pid):
            hit = Stage.FORWARD
        elif unsettled := self._not_over(self._passes.finished(worker.pid)[1]):
            hit = Stage.SETTLE
        elif holding is not None and holding.count:
            hit = Stage.FETCH if holding.youngest_ms < JUST_NOW_MS else Stage.BUFFER
        held = None if holding is None else holding.count
        return Kill(worker.pid, at, aimed_at, hit, held, tuple(unsettled))

    def _not_over(self, texts: Sequence[str]) -> list[str]:
        """Return those of some tasks whose records say that they go on."""
        ids = {text: self._ledger.submits[text].task_id for text in texts}
        known = [text for text in texts if ids[text]]
        prefix = RedisSettings().prefix
        with self._fleet.redis.pipeline(transaction=False) as pipe:
            for text in known:
                pipe.hget(names.record_key(prefix, ids[text]), "state")
            states = pipe.execute()
        return [
            text
            for text, state in zip(known, states, strict=True)
            if state is not None and TaskState(state.decode()) not in TERMINAL
        ]

    def _terminate(self, action: Action) -> bool:
        worker = self._any(action)
        if worker is not None:
            self._fleet.terminate(worker)
        return worker is not None

    def _pause(self, action: Action) -> bool:
        worker = self._any(action)
        if worker is None:
            return False
        self._fleet.pause(worker)

        def resume() -> None:
            time.sleep(action.lasts_s)
            self._fleet.resume(worker)

        healer = Thread(target=resume)
        healer.start()
        self._healers.append(healer)
        return True

    def _any(self, action: Action) -> Worker | None:
        workers = self._fleet.working()
        return workers[int(action.lot * len(workers))] if workers else None

    def _kill_web(self, action: Action) -> bool:
        processes = self._fleet.web_processes()
        if not processes:
            return False
        with suppress(psutil.NoSuchProcess):
            processes[int(action.lot * len(processes))].kill()
        return True

    def _restart_redis(self, action: Action) -> bool:
        self._fleet.restart_redis(action.lasts_s)
        return True

    def _cut(self, action: Action) -> bool:
        ids = self._fleet.connections(action.kind)
        random.Random(action.lot).shuffle(ids)
        chosen = ids[: math.ceil(len(ids) * action.share)]
        for number in chosen:
            # It may be gone by itself.
            with suppress(redis.ResponseError):
                self._fleet.redis.client_kill_filter(_id=number)
        return bool(chosen)
