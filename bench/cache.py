"""What doing equal work once saves: kept results, followers, equal members of a batch.

    Sharing       what closed loops ask for: new results, kept ones, or uncached ones
    burst         simultaneous calls -> how many were computed
    twins         a full batch with few different inputs -> how many rows were computed
    Repository    copies of models that share work and count what they compute

`bench.session` runs them.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import yaml

from bench import backlog, environments, processes
from bench.client import Http, post
from bench.load import latency_ms
from bench.results import Measurement, Place
from bench.targets import Broken, Service
from bench.workloads import Workload
from inferno.repository.manifest import MANIFEST
from inferno.testing.processes import wait_until

#: Different requests in the loop of hits.
REPEATED = 8
#: Simultaneous calls.
BURST = 64
#: Tasks that wait for one batch, and the number of different inputs among them.
TWINS, DIFFERENT = 32, 4
#: Counters of `twins`; its version neither keeps results nor lets tasks follow.
_OF_TWINS = ("deduplicated", "passes", "rows")
#: Limit for a worker to report what it has loaded, in seconds.
_KNOWN_S = 30.0
#: Versions of a copied model: one shares all equal work, one only within a batch.
_SHARES, _DEDUPLICATES = 1, 2


class Sharing(StrEnum):
    """What the requests of a closed loop have in common with earlier ones."""

    #: New inputs.
    MISSES = "misses"
    #: Inputs whose results are kept.
    HITS = "hits"
    #: New inputs with `"cache": false`, to compare with misses.
    OFF = "cache off"


def without(service: Service) -> Service:
    """Return a service whose calls bypass the cache."""
    return _with(service, b'"cache":false')


def _with(service: Service, member: bytes) -> Service:
    """Return a service whose bodies have one more member, given as JSON text."""

    def body(texts: list[str]) -> bytes:
        return b"%s,%s}" % (service.body(texts)[:-1], member)

    return replace(service, body=body)


def keep(service: Service, requests: Sequence[list[str]]) -> None:
    """Repeat requests until their results are kept.

    Raises:
      Broken: a result is not kept in time.
    """

    def is_kept(request: list[str]) -> bool:
        status, document = service.call("POST", service.path, service.body(request))
        return status == 200 and document.get("cached") is True

    for request in requests:
        try:
            wait_until(partial(is_kept, request), _KNOWN_S)
        except AssertionError:
            raise Broken(f"the result for {request} is not kept") from None


class Repository:
    """A model repository whose models do equal work once."""

    def __init__(self, root: Path) -> None:
        """Store the folder, which must be empty."""
        self.root = root

    def add(self, workload: Workload) -> None:
        """Add the model of a workload if it shares equal work; otherwise add a copy that does.

        A copy counts what it computes, and has a second version that shares only within a batch.
        """
        shipped = environments.ROOT / "models" / workload.model
        manifest = yaml.safe_load((shipped / str(workload.version) / MANIFEST).read_text())
        if manifest.get("deterministic"):
            (self.root / workload.model).symlink_to(shipped)
            return
        alone = {"results": False, "coalesce": False}
        for version, cache in ((_SHARES, {}), (_DEDUPLICATES, alone)):
            package = self.root / workload.model / str(version)
            shutil.copytree(shipped / str(workload.version), package)
            shutil.copy(Path(__file__).with_name("counted.py"), package)
            manifest |= {
                "version": version,
                "entrypoint": "counted:build",
                "deterministic": True,
                "cache": cache,
                "parameters": {
                    **manifest.get("parameters", {}),
                    "ledger": str(self._ledger(workload)),
                },
            }
            (package / MANIFEST).write_text(yaml.safe_dump(manifest))
        self._ledger(workload).touch()

    def _ledger(self, workload: Workload) -> Path:
        return self.root.parent / f"{workload.model}.ledger"

    def counts(self, workload: Workload) -> bool:
        """Tell whether the model counts what it computes."""
        return self._ledger(workload).exists()

    def computed(self, workload: Workload) -> tuple[int, int]:
        """Return the number of forward passes and of their rows, for a model that counts them."""
        rows = self._ledger(workload).read_text().split()
        return len(rows), sum(map(int, rows))


@dataclass(frozen=True)
class Counter:
    """Reads the counters of a platform and of its model."""

    service: Service
    workload: Workload
    repository: Repository

    def look(self) -> dict[str, float]:
        """Return the counters of the cache, with `passes` and `rows` if the model counts them.

        Raises:
          Broken: `GET /cache` does not answer.
        """
        status, document = self.service.call("GET", "/cache")
        if status != 200:
            raise Broken(f"/cache was answered with {status}: {document}")
        (found,) = (one for one in document["models"] if one["model"] == self.service.model)
        counts = {name: float(n) for name, n in found.items() if name != "model"}
        if self.repository.counts(self.workload):
            passes, rows = self.repository.computed(self.workload)
            counts |= {"passes": passes, "rows": rows}
        return counts

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """Return the differences to an earlier `look`."""
        return {name: n - before[name] for name, n in self.look().items()}


def burst(counter: Counter, asked: Sequence[str], place: Place) -> Measurement:
    """Send simultaneous calls, each on its own connection.

    Args:
      counter: counter of the service to call.
      asked: text of each call; all equal, or all different.
      place: target, workload and repeat.
    Returns:
      A measurement whose values are the counters, and `cached`, the number of cached answers.
    Raises:
      Broken: a call was refused.
    """
    before, used = counter.look(), processes.snapshot()
    began = time.perf_counter()
    latencies_s, answers = asyncio.run(_at_once(counter.service, asked))
    seconds = time.perf_counter() - began
    after = processes.snapshot()
    passes = {(a["batch"]["id"], a["batch"]["run_ms"]): a["batch"]["rows"] for a in answers}
    told = {"passes": float(len(passes)), "rows": float(sum(passes.values()))}
    kind = "equal" if len(set(asked)) == 1 else "different"
    return Measurement(
        **place,
        scenario=f"{len(asked)} {kind} calls at once",
        seconds=seconds,
        answered=len(answers),
        latency_ms=latency_ms(latencies_s),
        cpu_s=processes.cpu_s(used, after),
        rss_bytes=processes.rss_bytes(after),
        values={
            **told,
            **counter.since(before),
            "cached": float(sum("cached" in answer for answer in answers)),
        },
    )


async def _at_once(
    service: Service, asked: Sequence[str]
) -> tuple[list[float], list[dict[str, Any]]]:
    connections = [await Http.connect(service.port) for _ in asked]

    async def call(connection: Http, text: str) -> tuple[float, dict[str, Any]]:
        began = time.perf_counter()
        status, body = await connection.call(post(service.path, service.body([text])))
        took_s = time.perf_counter() - began
        if status != 200:
            raise Broken(f"a call was answered with {status}: {body[:200]!r}")
        return took_s, json.loads(body)

    try:
        found = await asyncio.gather(*map(call, connections, asked))
    finally:
        for connection in connections:
            connection.close()
    return [took_s for took_s, _ in found], [answer for _, answer in found]


def twins(counter: Counter, place: Place, texts: Iterator[str]) -> Measurement:
    """Drain a lane with few different inputs, for a version that shares only within a batch.

    Args:
      counter: counter of a service whose model counts what it computes.
      place: target, workload and repeat.
      texts: different texts.
    Returns:
      A measurement whose values are the counters, over all drains.
    Raises:
      Broken: as `backlog.measure`, or the version does not answer.
    """
    version = b'"version":%d' % _DEDUPLICATES
    service = replace(_with(counter.service, version), members=version + b",")
    # A version that is not preloaded is loaded for its first task.
    status, answer = service.call("POST", service.path, service.body([next(texts)]))
    if status != 200:
        raise Broken(f"version {_DEDUPLICATES} was answered with {status}: {answer}")

    def repeated() -> Iterator[str]:
        while True:
            yield from islice(cycle(list(islice(texts, DIFFERENT))), TWINS)

    before = counter.look()
    found = backlog.measure(service, TWINS, place, repeated())
    counted = {k: n for k, n in counter.since(before).items() if k in _OF_TWINS}
    return replace(found, scenario=f"{TWINS} waiting, {DIFFERENT} different", values=counted)
