"""What was run: the model's own notes of its forward passes, read as they are written."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Start:
    """A task entered a forward pass."""

    pid: int
    #: Monotonic seconds.
    at: float


class Passes:
    """The notes of all workers, dead or alive."""

    def __init__(self, path: Path) -> None:
        """Store where the model writes; see tests/chaos/model/model.py."""
        path.touch()
        self._file = path.open("rb")
        self._rest = b""
        #: Passes that each task was in, by its text.
        self.starts: dict[str, list[Start]] = defaultdict(list)
        #: How many of them came to their end.
        self.ends: Counter[str] = Counter()
        #: Tasks of the pass that each process is in, by its id.
        self._open: dict[int, list[str]] = defaultdict(list)
        #: End and tasks of the last pass that each process has finished.
        self._last: dict[int, tuple[float, list[str]]] = {}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self) -> None:
        """Take in what was written since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            text, pid, event, at = line.decode().split()
            self._take(text, int(pid), event, float(at))

    def running(self, pid: int) -> list[str]:
        """Return the tasks of the pass that a process is in."""
        return list(self._open.get(pid, ()))

    def finished(self, pid: int) -> tuple[float, list[str]]:
        """Return when the last pass of a process ended, 0 for never, and its tasks."""
        return self._last.get(pid, (0.0, []))

    def next_start(self, text: str, after: float, not_by: int) -> float | None:
        """Return when a task entered a pass of another process, None when it did not."""
        starts = self.starts.get(text, ())
        return min((s.at for s in starts if s.at >= after and s.pid != not_by), default=None)

    def _take(self, text: str, pid: int, event: str, at: float) -> None:
        if event == "start":
            self.starts[text].append(Start(pid, at))
            self._open[pid].append(text)
            return
        self.ends[text] += 1
        self._open[pid].remove(text)
        last_at, last = self._last.get(pid, (0.0, []))
        self._last[pid] = (at, [*last, text] if at == last_at else [text])
