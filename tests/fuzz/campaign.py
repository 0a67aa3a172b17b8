"""A run: cases from a seed against a platform, a bystander beside them, and a report."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from urllib.parse import urlsplit

import httpx

from tests.fuzz import answers, bystander, seeds
from tests.fuzz.case import Case
from tests.fuzz.generator import Generator
from tests.fuzz.processes import Processes
from tests.fuzz.wire import Address, exchange

#: Connections at the same time.
CONNECTIONS = 16
#: Memory that one process may keep, in bytes, and how long it has to give back the rest.
GROWTH_BYTES, SETTLE_S = 150_000_000, 15.0
#: Faults of one kind that are shown.
SHOWN = 3
#: Bytes of a case that are shown.
SHOWN_BYTES = 600


@dataclass(frozen=True)
class Options:
    """What to run, and what is too much."""

    seconds: float = 60.0
    seed: int = 1
    #: Number of the one case to run, or None for all.
    only: int | None = None
    #: Number of cases after which the run ends before its time.
    cases: float = math.inf
    #: Longest wait of the bystander, in seconds.
    wait_s: float = 1.0


@dataclass(frozen=True)
class Fault:
    """One rule that was broken."""

    what: str
    number: int
    case: Case

    @property
    def kind(self) -> tuple[str, str]:
        """Faults of one kind have the same cause, as far as can be seen from outside."""
        return self.case.kind, self.what.partition(":")[0]

    def __str__(self) -> str:
        pieces = b"".join(self.case.pieces)
        more = f" ... {len(pieces)} bytes" if len(pieces) > SHOWN_BYTES else ""
        return f"case {self.number}: {self.what}\n      {pieces[:SHOWN_BYTES]!r}{more}"


@dataclass
class Report:
    """What a run has shown."""

    seed: int
    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    hung: int = 0
    faults: list[Fault] = field(default_factory=list)
    #: Processes that ended, with the cases that were under way.
    dead: list[str] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    grown: int = 0
    waits: bystander.Waits = field(default_factory=bystander.Waits)
    wait_s: float = 1.0

    def broken(self) -> list[str]:
        """Return the rules for the whole run that were broken."""
        found = list(self.dead)
        if self.grown > GROWTH_BYTES:
            found.append(f"a process has grown by {self.grown / 1e6:.0f} MB")
        if self.waits.errors:
            found.append(
                f"the bystander saw {len(self.waits.errors)} errors, {self.waits.errors[:3]}"
            )
        if self.waits.worst_s > self.wait_s:
            found.append(f"the bystander waited for {self.waits.worst_s:.2f} s")
        return found

    def __str__(self) -> str:
        """Return a summary, with a few faults of each kind."""
        kinds = Counter(fault.kind for fault in self.faults)
        lines = [
            f"seed {self.seed}: {self.cases} cases",
            f"statuses: {dict(sorted(self.statuses.items()))}",
            f"5xx: {sum(n for status, n in self.statuses.items() if status >= 500)}, "
            f"hung connections: {self.hung}, dead processes: {len(self.dead)}",
            f"memory before (MB): {_megabytes(self.before)}",
            f"memory after (MB): {_megabytes(self.after)}",
            f"bystander: {self.waits.calls} calls, {len(self.waits.errors)} errors, "
            f"longest wait {self.waits.worst_s:.2f} s",
            *[f"BROKEN: {broken}" for broken in self.broken()],
        ]
        for kind, number in sorted(kinds.items()):
            lines.append(f"FAULT: {' / '.join(kind)} ({number} times)")
            shown = [fault for fault in self.faults if fault.kind == kind][:SHOWN]
            lines += [f"    {fault}" for fault in shown]
        return "\n".join(lines)


def run(
    url: str, pid: int, options: Options, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Send cases to a platform until the time is over.

    Args:
      url: of the web tier.
      pid: of the supervisor.
      options: what to run.
      say: is told each fault when it is found.
    """
    campaign = _Campaign(url, pid, options, say)
    with bystander.running(url) as campaign.report.waits:
        campaign.run()
    return campaign.report


class _Campaign:
    def __init__(self, url: str, pid: int, options: Options, say: Callable[[str], None]) -> None:
        where = urlsplit(url)
        self._address: Address = (where.hostname or "127.0.0.1", where.port or 80)
        document = httpx.get(f"{url}/openapi.json", timeout=30).json()
        requests = seeds.requests(document)
        self._generator = Generator(options.seed, requests, where.netloc.encode())
        self._processes = Processes(pid)
        self._options = options
        self._say = say
        self._lock = threading.Lock()
        self._recent: deque[str] = deque(maxlen=2 * CONNECTIONS)
        self.report = Report(options.seed, wait_s=options.wait_s)

    def run(self) -> None:
        """Run the cases, and watch the processes meanwhile."""
        self.report.before = self._processes.memory()
        end = time.monotonic() + self._options.seconds
        numbers = count() if self._options.only is None else iter([self._options.only])
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,))
        watch.start()
        try:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                clients = [pool.submit(self._work, numbers, end) for _ in range(CONNECTIONS)]
            for client in clients:
                client.result()
        finally:
            over.set()
            watch.join()
        self.report.grown = self._processes.settle(self.report.before, GROWTH_BYTES, SETTLE_S)
        self.report.after = self._processes.memory()

    def _work(self, numbers: object, end: float) -> None:
        while time.monotonic() < end:
            with self._lock:
                number = next(numbers, None)  # type: ignore[call-overload]
            if number is None or number >= self._options.cases:
                return
            self._try(number)

    def _try(self, number: int) -> None:
        case = self._generator.case(number)
        with self._lock:
            self._recent.append(f"{number} ({case.kind})")
        try:
            brought = exchange(self._address, case, partial(answers.is_complete, case))
        except OSError as exc:
            found, statuses, hung = [f"no connection: {exc!r}"], [], False
        else:
            found, hung = answers.faults(case, brought), brought.hung
            statuses = _statuses(case, brought.received)
        with self._lock:
            self.report.cases += 1
            self.report.hung += hung
            self.report.statuses.update(statuses)
            faults = [Fault(what, number, case) for what in found]
            self.report.faults += faults
        for fault in faults:
            self._say(f"{case.kind}: {fault}")

    def _watch(self, over: threading.Event) -> None:
        is_over = False
        while not is_over:
            is_over = over.wait(0.5)
            with self._lock:
                recent = ", ".join(self._recent)
            for process in self._processes.dead():
                self.report.dead.append(f"{process} has ended; the last cases were {recent}")
                self._say(self.report.dead[-1])


def _statuses(case: Case, received: bytes) -> list[int]:
    if answers.is_socket(case, received):
        return [101]
    try:
        return [answer.status for answer in answers.read_answers(received, case.methods)[0]]
    except answers.Malformed:
        return []


def _megabytes(sizes: dict[str, int]) -> dict[str, int]:
    return {name: round(size / 1e6) for name, size in sizes.items()}
