"""One run: the order in which targets are started, loaded and stopped.

    for each workload, for each repeat, for each target:
        start it, check its answers, warm it up
        closed loops -> its capacity -> an open loop at a share of that
        stop it, until none of its processes is left

Within each repeat the targets take turns, so that changes of the machine affect all of them.
"""

from __future__ import annotations

import http.client
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from bench import backlog, cache, load, processes, raw, sockets, wrk
from bench.cache import Sharing
from bench.client import ProtocolError
from bench.environments import NotInstalled
from bench.load import Load, Way
from bench.results import Failure, Measurement, Place, Results
from bench.targets import Broken, Inferno, Service, Target, verify
from bench.workloads import Numbers, Workload, texts

#: Errors that end the measuring of a target, but not the run.
_FAILURES = (
    Broken, ProtocolError, wrk.WrkFailed, OSError, ValueError, http.client.HTTPException
)  # fmt: skip
#: Rate of open loops, as a share of the rate that closed loops reached.
OPEN_SHARE = 0.7
#: Connections of the closed loop that finds the capacity if no other does.
PROBE_CONNECTIONS = 64
#: Calls that show whether a server is idle: each must be about as fast as a lone call, give or take
#: `SETTLED_S` seconds.
LONE_CALLS = 5
SETTLED_S = 0.02
#: Limit for a server to become idle, in seconds.
SETTLE_S = 10.0


@dataclass(frozen=True)
class Options:
    """The options of a run."""

    targets: Sequence[Target]
    workloads: Sequence[Workload]
    connections: Sequence[int]
    ways: Sequence[Way]
    #: Texts in one request.
    rows: Sequence[int]
    seconds: int
    warm_up_s: int
    repeats: int
    open_loop: bool = False
    #: Whether the bare engine is measured too.
    raw: bool = False
    #: Numbers of waiting tasks to drain; Inferno only.
    backlogs: Sequence[int] = ()
    #: Numbers of idle WebSockets, and for how long they are open; Inferno only.
    sockets: Sequence[int] = ()
    idle_s: float = 0.0
    #: Inferno's model repository, if the cache is measured; otherwise None.
    shared: cache.Repository | None = None


@dataclass(frozen=True)
class Scenario:
    """One kind of closed loop."""

    way: Way
    connections: int
    rows: int
    #: How requests use the cache; None outside the cache scenarios.
    sharing: Sharing | None = None

    @property
    def name(self) -> str:
        """Name, such as `http x64`, `http x64, 64 rows` or `http x64, hits`."""
        rows = f", {self.rows} rows" if self.rows > 1 else ""
        sharing = f", {self.sharing}" if self.sharing else ""
        return f"{self.way} x{self.connections}{rows}{sharing}"


OPEN_SCENARIO = f"http open, {OPEN_SHARE:.0%}"


class Session:
    """Carries out a run. `results` always has everything found so far."""

    def __init__(self, options: Options, results: Results, say: Callable[[str], None]) -> None:
        """Store what to do.

        Args:
          options: options of the run.
          results: filled by `run`.
          say: called with messages about progress.
        """
        self.results = results
        self._options = options
        self._say = say
        self._numbers = Numbers()
        #: Requests a second of an open loop, by target and workload.
        self._offered: dict[tuple[str, str], float] = {}

    def run(self) -> Iterator[None]:
        """Measure; yield after each target."""
        processes.adopt_orphans()
        targets = [target for target in self._options.targets if self._install(target)]
        for workload in self._options.workloads:
            left = list(targets)
            raw_left = self._options.raw
            for repeat in range(1, self._options.repeats + 1):
                if raw_left:
                    raw_left = self._measure_raw(workload, repeat)
                    yield
                for target in list(left):
                    self._say(
                        f"{workload.name}, {repeat} of {self._options.repeats}: {target.name}"
                    )
                    try:
                        self._visit(target, workload, repeat)
                    except _FAILURES as exc:
                        self._fail(target.name, workload, str(exc))
                        left.remove(target)
                    yield

    def _install(self, target: Target) -> bool:
        try:
            self.results.versions[target.name] = target.install(self._say)
        except NotInstalled as exc:
            self._fail(target.name, None, str(exc))
            return False
        return True

    def _measure_raw(self, workload: Workload, repeat: int) -> bool:
        """Measure the bare engine; return whether that succeeded."""
        self._say(f"{workload.name}, {repeat} of {self._options.repeats}: {raw.TARGET}")
        try:
            self.results.measurements += raw.measure(workload, self._options.seconds, repeat)
        except raw.RawFailed as exc:
            self._fail(raw.TARGET, workload, str(exc))
            return False
        return True

    def _fail(self, target: str, workload: Workload | None, reason: str) -> None:
        name = workload.name if workload else None
        self.results.failures.append(Failure(target, name, reason))
        self._say(f"  not measured: {reason}")

    def _visit(self, target: Target, workload: Workload, repeat: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"bench-{target.name.replace('/', '-')}-"))
        try:
            with target.serve(workload, folder) as service:
                verify(service, workload)
                lone_s = min(self._time_calls(service))
                self._measure(_Visit(target, workload, repeat, service, lone_s))
        finally:
            for command in processes.end_what_is_left():
                self._say(f"  killed a process that did not end: {command}")
            shutil.rmtree(folder, ignore_errors=True)

    def _measure(self, visit: _Visit) -> None:
        options = self._options
        if self._is_special(visit):
            # Sockets come first, while little freed memory is there for them to reuse.
            for number in options.sockets:
                self._say(f"    {number} idle sockets")
                self.results.measurements.append(
                    sockets.measure(visit.service, number, options.idle_s, visit.place)
                )
        capacity = 0.0
        for scenario in self._scenarios(visit):
            if options.warm_up_s:
                self._closed(visit.service, scenario, options.warm_up_s)
            self._settle(visit)
            before = processes.snapshot()
            done = self._closed(visit.service, scenario, options.seconds)
            self._note(
                visit, scenario.name, before, done, rows=scenario.rows, sharing=scenario.sharing
            )
            if scenario.way is Way.HTTP and scenario.rows == 1:
                capacity = max(capacity, done.answered / done.seconds)
        if options.open_loop:
            self._open(visit, capacity)
        if options.shared is not None:
            self._share(visit, options.shared)
        if self._is_special(visit):
            for waiting in options.backlogs:
                self._say(f"    a backlog of {waiting}")
                self._settle(visit)
                self.results.measurements.append(
                    backlog.measure(
                        visit.service, waiting, visit.place, texts(self._numbers.first())
                    )
                )

    def _is_special(self, visit: _Visit) -> bool:
        """Whether scenarios that only Inferno supports are measured: with the first workload."""
        return isinstance(visit.target, Inferno) and visit.workload is self._options.workloads[0]

    def _scenarios(self, visit: _Visit) -> Iterator[Scenario]:
        kinds: list[Sharing | None] = [None]
        if self._options.shared is not None:
            # Each repeat starts with another kind.
            kinds = list(Sharing)
            kinds = kinds[(first := (visit.repeat - 1) % len(kinds)) :] + kinds[:first]
        for way in self._options.ways:
            if way is Way.HTTP or isinstance(visit.target, Inferno):
                for rows in self._options.rows:
                    # The number of texts under way does not depend on the rows of a request.
                    numbers = (max(1, number // rows) for number in self._options.connections)
                    for connections in dict.fromkeys(numbers):
                        for kind in kinds:
                            yield Scenario(way, connections, rows, kind)

    def _closed(self, service: Service, scenario: Scenario, seconds: int) -> Load:
        first, rows = self._numbers.first(), scenario.rows
        asked, different = texts(first), Numbers.RANGE
        if scenario.sharing is Sharing.OFF:
            service = cache.without(service)
        elif scenario.sharing is Sharing.HITS:
            different = cache.REPEATED
            known = [list(islice(asked, rows)) for _ in range(different)]
            cache.keep(service, known)
            asked = cycle(text for request in known for text in request)
        if scenario.way is Way.HTTP and rows == 1:
            return wrk.run(
                service,
                connections=scenario.connections,
                seconds=seconds,
                first=first,
                different=different,
            )
        return load.closed_loop(
            service,
            scenario.way,
            connections=scenario.connections,
            rows=rows,
            seconds=seconds,
            texts=asked,
        )

    def _share(self, visit: _Visit, shared: cache.Repository) -> None:
        """Measure simultaneous equal work."""
        counter = cache.Counter(visit.service, visit.workload, shared)
        asked = texts(self._numbers.first())
        # Before the workers' first report no result is kept.
        cache.keep(visit.service, [[next(asked)]])
        for calls in ([next(asked)] * cache.BURST, list(islice(asked, cache.BURST))):
            self._settle(visit)
            self.results.measurements.append(cache.burst(counter, calls, visit.place))
        if shared.counts(visit.workload):
            self._settle(visit)
            self.results.measurements.append(cache.twins(counter, visit.place, asked))

    def _settle(self, visit: _Visit) -> None:
        """Wait until the server has finished the requests that wrk abandoned.

        Otherwise the next measurement would pay for them.
        """
        deadline = time.monotonic() + SETTLE_S
        while max(self._time_calls(visit.service)) > 2 * visit.lone_s + SETTLED_S:
            if time.monotonic() > deadline:
                self._say(f"    lone calls are slower than at first, {SETTLE_S:g} s after the load")
                return

    def _time_calls(self, service: Service) -> list[float]:
        """Return the durations of some calls, one after the other, in seconds."""
        times = []
        for text in islice(texts(self._numbers.first()), LONE_CALLS):
            began = time.perf_counter()
            service.call("POST", service.path, service.body([text]))
            times.append(time.perf_counter() - began)
        return times

    def _open(self, visit: _Visit, capacity: float) -> None:
        place = visit.target.name, visit.workload.name
        if place not in self._offered:
            if not capacity:
                probe = Scenario(Way.HTTP, PROBE_CONNECTIONS, 1)
                done = self._closed(visit.service, probe, self._options.seconds)
                capacity = done.answered / done.seconds
            if not capacity:
                raise Broken("the server answered no call")
            self._offered[place] = OPEN_SHARE * capacity
        rate = self._offered[place]
        self._settle(visit)
        before = processes.snapshot()
        done = load.open_loop(
            visit.service,
            rate=rate,
            seconds=self._options.seconds,
            texts=texts(self._numbers.first()),
            seed=visit.repeat,
        )
        self._note(visit, OPEN_SCENARIO, before, done, offered_rate=rate)

    def _note(
        self,
        visit: _Visit,
        scenario: str,
        before: processes.Snapshot,
        done: Load,
        *,
        rows: int = 1,
        offered_rate: float | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        after = processes.snapshot()
        is_hit = sharing is Sharing.HITS
        if sharing and (unlike := abs(done.cached - is_hit * done.answered)):
            done.errors["computed" if is_hit else "cached"] = unlike
        measured = Measurement(
            **visit.place,
            scenario=scenario,
            seconds=done.seconds,
            answered=done.answered,
            rows=rows,
            latency_ms=done.latency_ms,
            errors=done.errors,
            sample=done.sample,
            # A kept result reports the batch of an earlier task.
            mean_batch=None if is_hit else done.mean_batch,
            cached=done.cached if sharing else None,
            cpu_s={**processes.cpu_s(before, after), "load": done.cpu_s},
            rss_bytes=processes.rss_bytes(after),
            offered_rate=offered_rate,
            late_ms=done.late_ms,
        )
        self.results.measurements.append(measured)
        errors = f", {sum(done.errors.values())} errors" if done.errors else ""
        p50 = done.latency_ms.get("p50", float("nan"))
        self._say(f"    {scenario}: {measured.rate:,.0f}/s, p50 {p50:.1f} ms{errors}")


@dataclass(frozen=True)
class _Visit:
    """One start of a target."""

    target: Target
    workload: Workload
    repeat: int
    service: Service
    #: Duration of a lone call, in seconds.
    lone_s: float

    @property
    def place(self) -> Place:
        """The identity of this visit's measurements."""
        return {
            "target": self.target.name,
            "workload": self.workload.name,
            "repeat": self.repeat,
        }
