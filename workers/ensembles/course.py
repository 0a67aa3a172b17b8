"""Forward step of an ensemble: the course of one member through the graph of stages.

It says which stages can begin and takes their outcomes; it submits nothing itself. It belongs to
the thread of the pool that runs the member's batch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from inferno.errors import DeadlineExceeded, InfernoError
from inferno.protocol import tensors
from inferno.protocol.requests import InferRequest
from inferno.protocol.tasks import StageRun
from inferno.protocol.tensors import Tensors
from inferno.repository.graph import Stage, needed
from tasks.results.bridge import Subscription
from tasks.state.outcomes import Outcome
from workers.batches.member import Member, arguments


class _StageResult(msgspec.Struct):
    """The parts of a stage's result that are used."""

    version: int
    outputs: dict[str, Any]


_decode = msgspec.json.Decoder(_StageResult).decode


@dataclass(frozen=True)
class StageTask:
    """A stage of one member that is in progress."""

    stage: Stage
    #: Monotonic seconds.
    began_at: float
    subscription: Subscription


@dataclass(eq=False)
class Course:
    """One member on its way through the stages."""

    member: Member
    #: Stages that have not begun.
    left: list[Stage]
    values: Tensors
    #: Names of the values that are decided: present, or optional and left out.
    known: set[str]
    #: Stages in progress, by their task ids.
    tasks: dict[str, StageTask] = field(default_factory=dict)
    #: Stages that are done.
    stages: list[StageRun] = field(default_factory=list)
    error: InfernoError | None = None
    #: Seconds since the epoch.
    started_at: float = field(default_factory=time.time)

    @classmethod
    def of(cls, member: Member) -> Course:
        """Return the course of a member at its start, with the stages that its outputs need."""
        signature = member.package.signature
        outputs = member.outputs or [spec.name for spec in signature.outputs]
        left = needed(member.package.manifest.ensemble, outputs)
        inputs = {spec.name for spec in signature.inputs}
        return cls(member, left, dict(member.inputs), inputs)

    @property
    def task_id(self) -> str:
        """Id of the member's own task."""
        return str(self.member.request.id)

    @property
    def over(self) -> bool:
        """Whether the member has failed, or all of its stages are done."""
        return self.error is not None or not (self.left or self.tasks)

    def ready(self) -> list[Stage]:
        """Return the stages that can begin now."""
        return [stage for stage in self.left if stage.takes <= self.known]

    def request(self, stage: Stage) -> tuple[InferRequest, Tensors]:
        """Return the request of a stage, and its inputs.

        Raises:
          DeadlineExceeded: the member's deadline is over.
        """
        timeout_ms = None
        if self.member.request.expires is not None:
            timeout_ms = (self.member.request.expires.timestamp() - time.time()) * 1000
            if timeout_ms <= 0:
                raise DeadlineExceeded("it could not begin within timeout_ms", "timeout_ms")
        inputs = {
            name: self.values[value] for name, value in stage.inputs.items() if value in self.values
        }
        request = InferRequest(
            inputs=None,
            model=stage.model,
            version=stage.version,
            outputs=list(stage.outputs),
            priority=self.member.priority,
            timeout_ms=timeout_ms,
            codec="base64",
            cache=arguments(self.member).get("cache") is not False,
        )
        return request, inputs

    def fail(self, stage: Stage, error: InfernoError) -> None:
        """End with the error of a stage."""
        where = None if error.field is None else f"{stage.name}.{error.field}"
        crossed = type(error)(f"stage {stage.name}: {error.detail}", where)
        # The stage's own lane has retried already.
        crossed.transient = False
        self.error = crossed

    def take(self, outcome: Outcome) -> None:
        """Take the outcome of a stage in progress."""
        task = self.tasks.pop(outcome.task_id)
        task.subscription.close()
        if outcome.error is not None:
            self.fail(task.stage, outcome.error)
            return
        given = _decode(outcome.result)
        for name, value in task.stage.outputs.items():
            if name in given.outputs:
                tensor = given.outputs[name]
                field_name = f"{task.stage.name}.outputs.{name}"
                self.values[value] = tensors.decode(tensor, tensor["dtype"], field_name)
        self.known |= task.stage.gives
        ms = round((time.monotonic() - task.began_at) * 1000, 3)
        self.stages.append(
            StageRun(task.stage.name, task.stage.model, given.version, outcome.task_id, ms)
        )

    def outputs(self) -> Tensors:
        """Return the declared outputs that are present."""
        return {
            spec.name: self.values[spec.name]
            for spec in self.member.package.signature.outputs
            if spec.name in self.values
        }
