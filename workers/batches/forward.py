"""Forward step: answer the members of one batch, in a thread of the worker's pool.

An error of a member becomes its answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from inferno.batching.former import FlushReason
from inferno.batching.isolation import isolate
from inferno.batching.latency import Pass
from inferno.engine.collation import chunks
from inferno.engine.engine import Engine
from inferno.errors import ForwardFailed, InfernoError
from inferno.protocol.digest import digest
from inferno.protocol.tasks import BatchInfo, StageRun
from inferno.protocol.tensors import Tensors
from workers.batches.member import Batch, Member, arguments

logger = logging.getLogger(__name__)


class Answer(msgspec.Struct, frozen=True, eq=False):
    """Result of the forward pass for one member."""

    member: Member
    #: The declared outputs, or the reason why there are none.
    outputs: Tensors | Exception
    batch: BatchInfo
    #: Seconds since the epoch.
    started_at: float
    ended_at: float
    #: Whether another member with equal inputs was computed in its place.
    twin: bool = False
    #: Stages of an ensemble's member.
    stages: tuple[StageRun, ...] = ()
    #: Passes that the member was in: several if some failed, or if it has more rows than one takes.
    passes: Sequence[Pass] = ()


class EnsembleEngine(Protocol):
    """What an ensemble has in place of an engine."""

    def answers(
        self, batch: Batch, members: Sequence[Member], resumed: Container[str]
    ) -> Iterator[list[Answer]]:
        """Yield the answers of members, as they become ready.

        Args:
          batch: the batch of the members.
          members: all members of the batch, or fewer.
          resumed: ids of tasks that a worker has begun before.
        """


#: Returns a context for one call of a model's own code with a batch; ends a process that hangs.
Watch = Callable[[Batch], AbstractContextManager[None]]


@dataclass(frozen=True)
class Prepared:
    """Members whose inputs are ready for a forward pass."""

    batch: Batch
    #: Members to compute, each with the members of equal inputs.
    twins: dict[Member, list[Member]]
    #: Preprocessed inputs of each member.
    inputs: list[tuple[Member, Tensors]]
    #: Time of preprocessing, in nanoseconds.
    took_ns: dict[Member, int]
    #: Members whose inputs the model's own code rejects.
    errors: dict[Member, Exception]


def prepare(engine: Engine, batch: Batch, members: Sequence[Member], watch: Watch) -> Prepared:
    """Preprocess the inputs of members.

    A member whose input cannot be prepared fails alone. Where the package allows it, members with
    equal inputs are computed once.

    Args:
      engine: engine of the members' version.
      batch: the batch of the members.
      members: all members of the batch, or fewer.
      watch: entered once, for all members.
    """
    prepared = Prepared(batch, _twins(members), [], {}, {})
    with watch(batch):
        for member in prepared.twins:
            began = time.perf_counter_ns()
            try:
                with _contained():
                    prepared.inputs.append((member, engine.prepare(member.inputs)))
            except Exception as exc:
                prepared.errors[member] = _explain(exc, member)
            prepared.took_ns[member] = time.perf_counter_ns() - began
    return prepared


def answer(engine: Engine, prepared: Prepared, watch: Watch, started_at: float) -> list[Answer]:
    """Run the forward pass of prepared members.

    A member that makes the pass fail, fails alone: see `inferno.batching.isolation`.

    Args:
      engine: engine of the members' version.
      prepared: result of `prepare`.
      watch: entered for each forward pass.
      started_at: start of the batch's turn, in seconds since the epoch.
    """
    answers: list[Answer] = []
    for member, error in prepared.errors.items():
        answers += unanswered(prepared.batch, [member], error, started_at)
    if prepared.inputs:
        answers += _Passes(engine, prepared, watch, started_at).answers()
    for one in list(answers):
        answers += (
            msgspec.structs.replace(one, member=twin, twin=True)
            for twin in prepared.twins[one.member]
        )
    return answers


def unanswered(
    batch: Batch, members: Sequence[Member], error: Exception, started_at: float | None = None
) -> list[Answer]:
    """Return the answers of members that had no forward pass.

    Args:
      batch: the batch of the members.
      members: all members of the batch, or fewer.
      error: the reason.
      started_at: start of the attempt, in seconds since the epoch; by default now.
    """
    now = time.time()
    alone = BatchInfo(batch.id, 1, 1, FlushReason.ISOLATED, 0.0, 0.0)
    return [Answer(member, error, alone, started_at or now, now) for member in members]


def _twins(members: Sequence[Member]) -> dict[Member, list[Member]]:
    """Return the members to compute, each with the members of equal inputs."""
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


class _Passes:
    """The forward passes of one batch: one, or several while a failing member is isolated."""

    def __init__(self, engine: Engine, prepared: Prepared, watch: Watch, started_at: float) -> None:
        self._engine = engine
        self._prepared = prepared
        self._watch = watch
        self._started_at = started_at
        #: The last pass of each member, which decides its answer.
        self._rode_in: dict[Member, BatchInfo] = {}
        self._passes: dict[Member, list[Pass]] = {member: [] for member, _ in prepared.inputs}

    def answers(self) -> Iterator[Answer]:
        for (member, _), outputs in isolate(self._prepared.inputs, self._run):
            if isinstance(outputs, Exception):
                outputs = _explain(outputs, member)
            yield Answer(
                member,
                outputs,
                self._rode_in[member],
                self._started_at,
                time.time(),
                passes=self._passes[member],
            )

    def _run(self, part: Sequence[tuple[Member, Tensors]]) -> list[Tensors]:
        batch, twins = self._prepared.batch, self._prepared.twins
        members = [member for member, _ in part]
        rows = sum(member.rows for member in members)
        predicted_s = self._engine.predict(rows)
        started = time.monotonic()
        try:
            if part[0][0].rows > self._engine.max_batch_size:
                # A task with more rows than one pass takes is alone in its batch, and cut up.
                pieces = chunks(part[0][1], self._engine.max_batch_size)
                return [_joined([self._forward(members, [piece])[0] for piece in pieces])]
            return self._forward(members, [inputs for _, inputs in part])
        finally:
            info = BatchInfo(
                batch.id,
                sum(1 + len(twins[member]) for member in members),
                rows,
                batch.reason if len(part) == len(self._prepared.inputs) else FlushReason.ISOLATED,
                predicted_ms=round(predicted_s * 1000, 3),
                run_ms=round((time.monotonic() - started) * 1000, 3),
            )
            self._rode_in.update((member, info) for member in members)

    def _forward(self, members: Sequence[Member], inputs: Sequence[Tensors]) -> list[Tensors]:
        def began(places: Sequence[int], took: Pass) -> None:
            for place in places:
                self._passes[members[place]].append(took)
                # Preprocessing happened once, so it counts for the member's first pass only.
                took.input_ns += self._prepared.took_ns.pop(members[place], 0)

        with self._watch(self._prepared.batch), _contained():
            return self._engine.forward(inputs, began)


def _joined(pieces: Sequence[Tensors]) -> Tensors:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


@contextmanager
def _contained() -> Iterator[None]:
    """Turn an attempt of a model's code to end its thread into an error of its task."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as exc:
        raise RuntimeError(f"its code raised {type(exc).__name__}") from exc


def _explain(exc: Exception, member: Member) -> Exception:
    if isinstance(exc, InfernoError):
        return exc
    logger.warning("task %s: %s failed", member.request.id, member.package.name, exc_info=exc)
    text = f"{type(exc).__name__}: {_text(exc)}"
    explained = ForwardFailed(f"{member.package.name} failed: {text}")
    explained.__cause__ = exc
    return explained


def _text(exc: Exception) -> str:
    # A model's exception may fail to say what it is, and must not fail the batch mates with it.
    try:
        return str(exc)
    except Exception as broken:
        return f"(its text cannot be read: {type(broken).__name__})"
