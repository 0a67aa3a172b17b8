"""One trial: an attack in a process of its own, beside bystanders and a watch on memory."""

from __future__ import annotations

import multiprocessing
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.attacks.attacks import ATTACKS, Attack
from tests.attacks.bystander import Bystander, Waits
from tests.attacks.processes import Memory, Watch
from tests.attacks.wire import Attacker

#: How long bystanders call before the attack begins, in seconds.
BEFORE_S = 1.0

#: Number of bystanders that keep their connection: enough to have one at each web process.
KEPT = 12


@dataclass(frozen=True)
class Outcome:
    """What an attack has done."""

    attack: str
    kept: Waits
    fresh: Waits
    died: list[str]
    findings: list[str]
    memory: list[Memory]

    @property
    def errors(self) -> list[str]:
        """Errors of both bystanders."""
        return self.kept.errors + self.fresh.errors

    @property
    def worst_s(self) -> float:
        """The longest wait of a bystander, in seconds."""
        return max(self.kept.worst_s, self.fresh.worst_s)

    def document(self) -> dict[str, Any]:
        """Return the outcome as JSON has it."""
        return asdict(self)


def run(attack: Attack, url: str, supervisor: int, seconds: float, after_s: float) -> Outcome:
    """Run an attack.

    Args:
      attack: which one.
      url: of the platform.
      supervisor: pid of its `inferno up`.
      seconds: how long the attack may last.
      after_s: how long to wait before memory is looked at again.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    fresh = Bystander(host, port, attack.bystander, keeps=False)
    kept = [Bystander(host, port, attack.bystander, keeps=True) for _ in range(KEPT)]
    with Watch(supervisor) as watch:
        with ExitStack() as calling:
            for bystander in (fresh, *kept):
                calling.enter_context(bystander)
            time.sleep(BEFORE_S)
            findings = _attack(attack, host, port, seconds)
            time.sleep(min(after_s, 2.0))
        time.sleep(max(after_s - 2.0, 0.0))
    waits = sum((bystander.waits for bystander in kept), Waits())
    return Outcome(attack.name, waits, fresh.waits, watch.died, findings, watch.memory)


def _attack(attack: Attack, host: str, port: int, seconds: float) -> list[str]:
    """Run an attack in a process of its own; returns its findings."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(attack.name, host, port, seconds, sender))
    process.start()
    sender.close()
    try:
        # Connections are given up ten seconds after the attack's time.
        done = receiver.poll(seconds + 20)
        return list(receiver.recv()) if done else ["the attack did not end"]
    except EOFError:
        return ["the attack ended with an error"]
    finally:
        process.kill()
        process.join()


def _work(name: str, host: str, port: int, seconds: float, sender: Any) -> None:
    attacker = Attacker(host, port, seconds)
    try:
        ATTACKS[name].run(attacker)
    except OSError as exc:
        # The platform has refused it, which is its right.
        print(f"{name}: {type(exc).__name__}: {exc}", file=sys.stderr)
    sender.send(attacker.findings)
