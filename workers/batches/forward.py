"""The forward step: answer the members of one batch.

It runs in a thread of the worker's pool. What is wrong with a member becomes its answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
from celery.worker.request import Request

from inferno.batching.former import FlushReason
from inferno.batching.isolation import isolate
from inferno.batching.latency import Pass
from inferno.engine.collation import chunks
from inferno.engine.engine import Engine
from inferno.errors import ForwardFailed, InfernoError
from inferno.protocol.digest import digest
from inferno.protocol.tasks import BatchInfo, StageRun
from inferno.protocol.tensors import Tensors
from inferno.protocol.webhooks import DEFAULT_EVENTS
from inferno.repository.repository import Package
from tasks.broker.lanes import Held

logger = logging.getLogger(__name__)


class Webhook(msgspec.Struct, frozen=True):
    """Where a task's client wants to be told."""

    url: str
    #: Of `inferno.protocol.webhooks.EVENTS`.
    events: tuple[str, ...] = DEFAULT_EVENTS


class Member(msgspec.Struct, frozen=True, eq=False):
    """One task in a worker's hands."""

    request: Request
    #: Its message.
    held: Held
    package: Package
    inputs: Tensors
    #: What it fills of a batch: the first dimension of its inputs, or 1 where that is no batch.
    rows: int
    #: Outputs that the client wants, or None for all.
    outputs: list[str] | None
    #: How numbers are written in the result.
    codec: str
    priority: int
    #: When the client's call was accepted; seconds since the epoch, as all times here.
    accepted_at: float
    #: When this worker held the task.
    received_at: float
    webhook: Webhook | None = None
    #: `inputs` only stand in for those that are under a key of their own; see `tasks.state.claims`.
    claimed: bool = False


@dataclass(frozen=True)
class Batch:
    """Members that leave for one forward pass together."""

    id: str
    reason: FlushReason
    members: list[Member]


class Answer(msgspec.Struct, frozen=True, eq=False):
    """What the forward pass gave one member."""

    member: Member
    #: The declared outputs, or why there are none.
    outputs: Tensors | Exception
    batch: BatchInfo
    #: Seconds since the epoch.
    started_at: float
    ended_at: float
    #: Another member with equal inputs was computed in its place.
    twin: bool = False
    #: Of an ensemble.
    stages: tuple[StageRun, ...] = ()
    #: In which it was computed; several, if some failed or it has more rows than one takes.
    passes: Sequence[Pass] = ()


class Coordinator(Protocol):
    """What answers the members of an ensemble's batch, in place of an engine."""

    def answers(
        self, batch: Batch, members: Sequence[Member], again: Container[str]
    ) -> Iterator[list[Answer]]:
        """Answer members, those first that are ready first.

        Args:
          batch: that they came in.
          members: all of the batch, or fewer.
          again: ids of tasks that a worker has begun before.
        """


def arguments(member: Member) -> dict[str, Any]:
    """Return the keyword arguments of a member's message, as far as they can be read."""
    try:
        found: Any = member.request.kwargs
    except Exception:  # Whatever the message's encoding makes of its body.
        return {}
    return found if isinstance(found, dict) else {}


#: Watches what a model does with a batch: its own code runs in the body of the context.
Watch = Callable[[Batch], AbstractContextManager[None]]


@dataclass(frozen=True)
class Prepared:
    """Members whose inputs are ready for a forward pass."""

    batch: Batch
    #: The members that have to be computed, each with those of equal inputs.
    twins: dict[Member, list[Member]]
    #: What the artifact takes of each.
    inputs: list[tuple[Member, Tensors]]
    #: How long that took, in nanoseconds.
    took_ns: dict[Member, int]
    #: Those whose inputs the model's own code finds wrong.
    errors: dict[Member, Exception]


def prepare(engine: Engine, batch: Batch, members: Sequence[Member], watch: Watch) -> Prepared:
    """Preprocess the inputs of those members of a batch that are still wanted.

    A member whose input cannot be prepared fails alone. Where the package allows it, members with
    equal inputs are computed once.

    Args:
      engine: of the members' version.
      batch: that they came in.
      members: all of the batch, or fewer.
      watch: entered for the whole of it.
    """
    prepared = Prepared(batch, _twins(members), [], {}, {})
    with watch(batch):
        for member in prepared.twins:
            began = time.perf_counter_ns()
            try:
                prepared.inputs.append((member, engine.prepare(member.inputs)))
            except Exception as exc:
                prepared.errors[member] = _explain(exc, member)
            prepared.took_ns[member] = time.perf_counter_ns() - began
    return prepared


def answer(engine: Engine, prepared: Prepared, watch: Watch, started_at: float) -> list[Answer]:
    """Answer the members of a batch.

    One that makes the forward pass fail, fails alone: see `inferno.batching.isolation`.

    Args:
      engine: of the members' version.
      prepared: what `prepare` made of them.
      watch: entered for each forward pass.
      started_at: when the batch had its turn; seconds since the epoch.
    """
    answers: list[Answer] = []
    for member, error in prepared.errors.items():
        answers += unanswered(prepared.batch, [member], error, started_at)
    if prepared.inputs:
        answers += _isolated(engine, prepared, started_at, watch)
    for one in list(answers):
        answers += (
            msgspec.structs.replace(one, member=twin, twin=True)
            for twin in prepared.twins[one.member]
        )
    return answers


def unanswered(
    batch: Batch, members: Sequence[Member], error: Exception, started_at: float | None = None
) -> list[Answer]:
    """Return the answers of members that have had no forward pass.

    Args:
      batch: that they came in.
      members: all of the batch, or fewer.
      error: why.
      started_at: when that began; by default just now.
    """
    now = time.time()
    alone = BatchInfo(batch.id, 1, 1, FlushReason.ISOLATED, 0.0, 0.0)
    return [Answer(member, error, alone, started_at or now, now) for member in members]


def _twins(members: Sequence[Member]) -> dict[Member, list[Member]]:
    """Return the members that have to be computed, each with those of equal inputs."""
    if len(members) < 2 or not members[0].package.deduplicates:
        return {member: [] for member in members}
    first: dict[str, Member] = {}
    twins: dict[Member, list[Member]] = {}
    for member in members:
        if arguments(member).get("cache") is False:
            twins[member] = []
            continue
        known = first.setdefault(digest(member.inputs), member)
        if known is member:
            twins[member] = []
        else:
            twins[known].append(member)
    return twins


def _isolated(
    engine: Engine, prepared: Prepared, started_at: float, watch: Watch
) -> Iterator[Answer]:
    batch, twins = prepared.batch, prepared.twins
    # The last pass that each member was in, which is the one that decided it.
    rode_in: dict[Member, BatchInfo] = {}
    passes: dict[Member, list[Pass]] = {member: [] for member, _ in prepared.inputs}

    def forward(members: Sequence[Member], inputs: Sequence[Tensors]) -> list[Tensors]:
        def began(places: Sequence[int], took: Pass) -> None:
            for place in places:
                passes[members[place]].append(took)
                # It was prepared once, for the first of its passes.
                took.input_ns += prepared.took_ns.pop(members[place], 0)

        with watch(batch):
            return engine.forward(inputs, began)

    def run(part: Sequence[tuple[Member, Tensors]]) -> list[Tensors]:
        members = [member for member, _ in part]
        rows = sum(member.rows for member in members)
        predicted_s = engine.predict(rows)
        started = time.monotonic()
        try:
            if part[0][0].rows > engine.max_batch_size:
                # A task of more rows than one pass takes rides alone, in pieces.
                pieces = chunks(part[0][1], engine.max_batch_size)
                return [_joined([forward(members, [piece])[0] for piece in pieces])]
            return forward(members, [inputs for _, inputs in part])
        finally:
            info = BatchInfo(
                batch.id,
                sum(1 + len(twins[member]) for member, _ in part),
                rows,
                batch.reason if len(part) == len(prepared.inputs) else FlushReason.ISOLATED,
                predicted_ms=round(predicted_s * 1000, 3),
                run_ms=round((time.monotonic() - started) * 1000, 3),
            )
            rode_in.update((member, info) for member, _ in part)

    for (member, _), outputs in isolate(prepared.inputs, run):
        if isinstance(outputs, Exception):
            outputs = _explain(outputs, member)
        yield Answer(
            member, outputs, rode_in[member], started_at, time.time(), passes=passes[member]
        )


def _joined(pieces: Sequence[Tensors]) -> Tensors:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _explain(exc: Exception, member: Member) -> Exception:
    if isinstance(exc, InfernoError):
        return exc
    logger.warning("task %s: %s failed", member.request.id, member.package.name, exc_info=exc)
    explained = ForwardFailed(f"{member.package.name} failed: {type(exc).__name__}: {exc}")
    explained.__cause__ = exc
    return explained
