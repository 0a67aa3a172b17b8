"""What clients sent and saw: the books against which the platform's promises are checked.

Kept in the memory of the suite, which nothing kills. All times are monotonic seconds.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from threading import Lock
from typing import Any

from inferno.errors import FateUnknown
from tests.chaos.model.model import answer


class Way(StrEnum):
    """How a client submits, and waits for the answer."""

    #: One WebSocket for many tasks.
    SOCKET = "socket"
    #: A submit, and polling.
    POLL = "poll"
    #: A synchronous call.
    SYNC = "sync"


class Fate(StrEnum):
    """What a client was told of its submit."""

    #: Nothing yet.
    OPEN = "open"
    #: The platform has promised to answer.
    ACCEPTED = "accepted"
    #: The platform has clearly said no.
    REFUSED = "refused"
    #: The connection was cut, or fell silent, before there was an answer.
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Submit:
    """One task, from its client's side."""

    #: Unique, so that it tells the task wherever it is seen.
    text: str
    way: Way
    sent_at: float
    fate: Fate = Fate.OPEN
    task_id: str = ""
    #: What must be the same whenever the answer is looked at; empty until it is.
    content: str = ""
    answered_at: float = 0.0
    #: The subscription that the answer was pushed to last.
    subscription: str = ""


@dataclass(frozen=True)
class Violation:
    """A broken promise."""

    text: str
    task_id: str
    what: str


class Ledger:
    """Every submit and every answer of a run; for any number of threads."""

    def __init__(self) -> None:
        """Begin with empty books."""
        self._lock = Lock()
        self._pending = 0
        self.submits: dict[str, Submit] = {}
        self._by_task: dict[str, Submit] = {}
        self.fates: Counter[Fate] = Counter()
        self.answered = 0
        #: Submits that were refused, by the reason that was given.
        self.refusals: Counter[str] = Counter()
        #: Answers seen twice with different content, and pushed twice to one subscription.
        self.duplicates: list[Violation] = []
        #: Answers that are not what the model answers, and errors: the model never fails.
        self.wrong: list[Violation] = []
        #: When something was answered last.
        self.progressed_at = time.monotonic()

    @property
    def pending(self) -> int:
        """Submits on whose fate or answer a client waits."""
        return self._pending

    def submit(self, way: Way) -> str:
        """Note a submit just before it is sent; return the text that names it."""
        with self._lock:
            text = f"task-{len(self.submits):07d}"
            self.submits[text] = Submit(text, way, time.monotonic())
            self._pending += 1
        return text

    def accept(self, text: str, task_id: str) -> None:
        """Note that the platform took a submit."""
        with self._lock:
            submit = self._decide(text, Fate.ACCEPTED)
            submit.task_id = task_id
            other = self._by_task.setdefault(task_id, submit)
            if other is not submit:
                self.wrong.append(Violation(text, task_id, f"shares its id with {other.text}"))

    def refuse(self, text: str, reason: str) -> None:
        """Note that the platform did not take a submit, or cannot say whether it did."""
        with self._lock:
            self._decide(text, Fate.UNKNOWN if reason == FateUnknown.code else Fate.REFUSED)
            self._pending -= 1
            self.refusals[reason] += 1

    def cut(self, texts: Iterable[str]) -> None:
        """Note submits of which nothing more will be heard."""
        with self._lock:
            for text in texts:
                self._decide(text, Fate.UNKNOWN)
                self._pending -= 1

    def answer(self, task_id: str, view: Mapping[str, Any], subscription: str = "") -> None:
        """Note that a client saw how a task ended.

        Args:
          task_id: as accepted.
          view: of the task, or the answer of a synchronous call.
          subscription: names it where the answer was pushed to one; a name of its own for each.
        """
        content = _content(view)
        with self._lock:
            submit = self._by_task.get(task_id)
            if submit is None:
                self.wrong.append(Violation("", task_id, "answered, but was never accepted"))
                return
            if not submit.content:
                self._first(submit, content, view)
            elif submit.content != content:
                what = f"answered {submit.content}, then {content}"
                self.duplicates.append(Violation(submit.text, task_id, what))
            if subscription:
                if submit.subscription == subscription:
                    what = f"pushed twice to {subscription}"
                    self.duplicates.append(Violation(submit.text, task_id, what))
                submit.subscription = subscription

    def unanswered(self) -> list[Submit]:
        """Return what was accepted and not answered."""
        with self._lock:
            return [s for s in self.submits.values() if s.fate is Fate.ACCEPTED and not s.content]

    def _decide(self, text: str, fate: Fate) -> Submit:
        submit = self.submits[text]
        assert submit.fate is Fate.OPEN, f"{text} is {submit.fate}, and now {fate}"
        submit.fate = fate
        self.fates[fate] += 1
        return submit

    def _first(self, submit: Submit, content: str, view: Mapping[str, Any]) -> None:
        submit.content = content
        submit.answered_at = self.progressed_at = time.monotonic()
        self._pending -= 1
        self.answered += 1
        outputs = view.get("outputs") or {}
        if outputs.get("text", {}).get("data") != [answer(submit.text)]:
            self.wrong.append(Violation(submit.text, submit.task_id, content))


def _content(view: Mapping[str, Any]) -> str:
    # These are in a polled view, a pushed one and a synchronous answer alike. Another pass would
    # have another batch and other timings, so a replaced answer shows even with the same outputs.
    parts = {name: view.get(name) for name in ("outputs", "batch", "timings", "worker", "error")}
    return json.dumps(parts, sort_keys=True)
