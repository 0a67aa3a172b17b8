"""Answers the tasks of an ensemble by tasks of its stages' models.

Each stage of each member is an ordinary durable task in its model's own lane, so that it rides in
the batches that form there, whoever else it comes from:

    ready stages of all members --submit--> lanes ... outcomes --> values --> stages now ready

Members do not wait for each other. A stage's task has an id that follows from the ensemble's task
and the stage's name: when this worker ends, the next one to hold the ensemble's task finds what was
begun, and goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import msgspec
from celery import Celery
from celery.worker import state as worker_state

from inferno.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InfernoError,
    ResultExpired,
    TaskCancelled,
)
from inferno.names import stage_task_id
from inferno.protocol import tensors
from inferno.protocol.requests import InferRequest
from inferno.protocol.tasks import BatchInfo, StageRun
from inferno.protocol.tensors import Tensors
from inferno.repository.graph import Stage, needed
from inferno.repository.repository import Package
from inferno.settings import Settings
from tasks.broker.connection import connect
from tasks.control.deadlines import Deadlines
from tasks.control.tasks import Control
from tasks.intake.catalog import Catalog
from tasks.intake.submit import Submission, Submitter
from tasks.results.bridge import Bridge, Subscription
from tasks.state.deployments import Deployments, Outdated
from tasks.state.outcomes import Outcome
from tasks.state.records import Records
from workers.batches.forward import Answer, Batch, Member, arguments

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often it is looked whether tasks are over that nobody has told of, in seconds.
TICK_S = 1.0
#: Pause before another try when Redis does not answer, in seconds.
RETRY_S = 0.5
#: How long a stopping worker still waits for stages, in seconds. What is not answered by then is
#: given back, and another worker goes on with it.
GRACE_S = 2.0


class _Given(msgspec.Struct):
    """What a stage's result says."""

    version: int
    outputs: dict[str, Any]


_decode = msgspec.json.Decoder(_Given).decode


class _Stopped(Exception):
    """This worker stops, and others go on."""


@dataclass(frozen=True)
class _StageTask:
    """A stage of one member that is under way."""

    stage: Stage
    began_at: float
    subscription: Subscription


@dataclass(eq=False)
class _Run:
    """One member on its way through the stages."""

    member: Member
    #: Stages that have not begun.
    left: list[Stage]
    values: Tensors
    #: Values that are there, and optional ones that nobody has given.
    known: set[str]
    #: What is under way, by the ids of its tasks.
    tasks: dict[str, _StageTask] = field(default_factory=dict)
    stages: list[StageRun] = field(default_factory=list)
    error: InfernoError | None = None
    started_at: float = field(default_factory=time.time)

    @classmethod
    def of(cls, member: Member) -> _Run:
        signature = member.package.signature
        outputs = member.outputs or [spec.name for spec in signature.outputs]
        left = needed(member.package.manifest.ensemble, outputs)
        inputs = {spec.name for spec in signature.inputs}
        return cls(member, left, dict(member.inputs), inputs)

    @property
    def task_id(self) -> str:
        return str(self.member.request.id)

    @property
    def over(self) -> bool:
        return self.error is not None or not (self.left or self.tasks)

    def ready(self) -> list[Stage]:
        """Return the stages that can begin now."""
        return [stage for stage in self.left if stage.takes <= self.known]

    def fail(self, stage: Stage, error: InfernoError) -> None:
        """End with a stage's error."""
        where = None if error.field is None else f"{stage.name}.{error.field}"
        crossed = type(error)(f"stage {stage.name}: {error.detail}", where)
        # Its own lane has tried again, if that was worth it.
        crossed.transient = False
        self.error = crossed

    def take(self, outcome: Outcome) -> None:
        """Go on with the outcome of one of its stages."""
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


class Coordinator:
    """Coordinates all ensembles of a worker; it computes nothing itself."""

    def __init__(self, app: Celery, settings: Settings) -> None:
        """Read which models there are, and store how to reach them.

        Raises:
          PackageError: the model repository cannot be read.
        """
        client = connect(settings)
        self.records = Records(client, settings)
        self.control = Control(app, client, settings)
        self.submitter = Submitter(app, client, settings)
        self.catalog = Catalog(Deployments(client, settings), settings)
        self.bridge = Bridge(client, self.records, settings.redis.prefix, "inferno-ensembles")
        self.deadlines = Deadlines(self.bridge, self.records, self.control)


class Ensemble:
    """One loaded ensemble: what an engine is to other models."""

    #: It has no weights.
    memory_bytes = 0

    def __init__(self, package: Package, coordinator: Coordinator) -> None:
        """Store what there is; an ensemble has nothing to load."""
        self.package = package
        self._coordinator = coordinator

    def predict(self, rows: int) -> float:
        """Return 0: how long a batch takes depends on what else waits for its stages."""
        return 0.0

    def answers(
        self, batch: Batch, members: Sequence[Member], again: Container[str]
    ) -> Iterator[list[Answer]]:
        """Answer the members of a batch, those first that are ready first.

        It ends early when the worker stops; who has no answer then is to be given back.

        Args:
          batch: that they came in.
          members: all of the batch, or fewer.
          again: ids of tasks that a worker has begun before.
        """
        course = _Course(self._coordinator, batch, members)
        try:
            course.resume(again)
            while course.runs:
                course.begin()
                if answers := course.answers():
                    yield answers
                else:
                    course.wait()
        except _Stopped:
            logger.info("%d tasks are left for another worker", len(course.runs))
        finally:
            course.close()


class _Course:
    """One batch on its way; it belongs to one thread."""

    def __init__(self, coordinator: Coordinator, batch: Batch, members: Sequence[Member]) -> None:
        self._here = coordinator
        self._batch = batch
        self._rows = sum(member.rows for member in members)
        self._size = len(members)
        self.runs = {str(member.request.id): _Run.of(member) for member in members}
        #: Of stages' tasks; whoever learns of one puts it here.
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        #: Whose stage a task is.
        self._runs_by_task: dict[str, _Run] = {}
        self._next_look = time.monotonic() + TICK_S
        self._stopping_since: float | None = None

    def resume(self, again: Container[str]) -> None:
        """Take up the stages that another worker has begun."""
        begun = {
            stage_task_id(run.task_id, stage.name): (run, stage)
            for run in self.runs.values()
            if run.task_id in again
            for stage in run.left
        }
        if not begun:
            return
        records = self._persist(lambda: self._here.records.records(list(begun)))
        outcomes = self._persist(lambda: self._here.records.outcomes(list(begun)))
        for (task_id, (run, stage)), record in zip(begun.items(), records, strict=True):
            if record is None:
                continue
            outcome = outcomes.get(task_id)
            if outcome is None and record.state.terminal:
                run.fail(stage, ResultExpired("its result was deleted before it was used"))
                continue
            # Whoever submitted it was to be told, and is gone.
            self._join(run, stage, task_id, self._here.bridge.subscribe)
            if outcome is not None:
                self._outcomes.put(outcome)

    def begin(self) -> None:
        """Submit the stages that can begin."""
        ready = [
            (run, stage) for run in self.runs.values() if run.error is None for stage in run.ready()
        ]
        while ready:
            submissions: list[Submission] = []
            submitted: list[tuple[_Run, Stage]] = []
            for run, stage in ready:
                try:
                    submissions.append(self._submission(run, stage))
                    submitted.append((run, stage))
                except InfernoError as error:
                    run.fail(stage, error)
            ready = self._submit(submissions, submitted) if submissions else []

    def _submit(
        self, submissions: list[Submission], ready: list[tuple[_Run, Stage]]
    ) -> list[tuple[_Run, Stage]]:
        """Submit stages; returns those for which another version is to be chosen."""
        for one, (run, stage) in zip(submissions, ready, strict=True):
            self._join(run, stage, one.task_id, self._here.bridge.expect)
        reply_to = self._here.bridge.reply_to
        answers = self._persist(lambda: self._here.submitter.submit_all(submissions, reply_to))
        outdated = []
        for one, (run, stage), answer in zip(submissions, ready, answers, strict=True):
            if isinstance(answer, Outdated):
                self._part(run, one.task_id)
                run.left.append(stage)
                outdated.append((run, stage))
            elif isinstance(answer, InfernoError):
                self._part(run, one.task_id)
                run.fail(stage, answer)
            elif isinstance(answer, Exception):
                raise answer
            elif answer.outcome is not None:
                self._outcomes.put(answer.outcome)
            else:
                self._here.deadlines.watch(one.task_id, answer.deadline)
        if outdated:
            self._persist(lambda: self._here.catalog.refresh(packages=False))
        return outdated

    def _submission(self, run: _Run, stage: Stage) -> Submission:
        """Return what a stage is asked.

        Raises:
          DeadlineExceeded: it could not begin in time.
          ModelNotFound: its model is gone.
        """
        member = run.member
        left_ms = None
        if member.request.expires is not None:
            left_ms = (member.request.expires.timestamp() - time.time()) * 1000
            if left_ms <= 0:
                raise DeadlineExceeded("it could not begin within timeout_ms", "timeout_ms")
        package, generation = self._here.catalog.choose(stage.model, stage.version)
        inputs = {
            name: run.values[value] for name, value in stage.inputs.items() if value in run.values
        }
        request = InferRequest(
            inputs=None,
            model=stage.model,
            version=stage.version,
            outputs=list(stage.outputs),
            priority=member.priority,
            timeout_ms=left_ms,
            codec="base64",
            cache=arguments(member).get("cache") is not False,
        )
        task_id = stage_task_id(run.task_id, stage.name)
        return Submission(request, package, inputs, task_id, run.task_id, generation)

    def _join(
        self,
        run: _Run,
        stage: Stage,
        task_id: str,
        listen: Callable[[str, Callable[[Outcome], None]], Subscription],
    ) -> None:
        run.left.remove(stage)
        self._runs_by_task[task_id] = run
        run.tasks[task_id] = _StageTask(
            stage, time.monotonic(), listen(task_id, self._outcomes.put)
        )

    def _part(self, run: _Run, task_id: str) -> None:
        del self._runs_by_task[task_id]
        run.tasks.pop(task_id).subscription.close()

    def wait(self) -> None:
        """Go on when a stage is over, or it is time to look after everyone.

        Raises:
          _Stopped: the worker stops.
        """
        try:
            self._take(self._outcomes.get(timeout=max(self._next_look - time.monotonic(), 0)))
            while True:
                # Those of a batch come together.
                self._take(self._outcomes.get_nowait())
        except Empty:
            pass
        self._check_stop()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + TICK_S
            with suppress(BrokerUnavailable):
                self._look()

    def _take(self, outcome: Outcome) -> None:
        run = self._runs_by_task.pop(outcome.task_id, None)
        if run is not None and run.error is None:
            run.take(outcome)

    def _look(self) -> None:
        """Learn of stages that Celery itself has ended, and of members that were cancelled."""
        over = self._here.records.outcomes([*self._runs_by_task, *self.runs])
        for task_id, outcome in over.items():
            if task_id in self.runs:
                # Whatever is answered now is dropped.
                self.runs[task_id].error = TaskCancelled("it was cancelled")
            else:
                self._take(outcome)

    def answers(self) -> list[Answer]:
        """Return the answers of members that are over, and forget these."""
        over = [run for run in self.runs.values() if run.over]
        for run in over:
            del self.runs[run.task_id]
            self._call_off(run)
        return [self._answer(run) for run in over]

    def _call_off(self, run: _Run) -> None:
        """Cancel the stages of a member that has failed; it is a pity, but no more, if one runs."""
        for task_id in list(run.tasks):
            if task_id in self._runs_by_task:
                self._part(run, task_id)
            with suppress(InfernoError):
                self._here.control.cancel(task_id)

    def _answer(self, run: _Run) -> Answer:
        member, ended_at = run.member, time.time()
        run_ms = round((ended_at - run.started_at) * 1000, 3)
        reason = self._batch.reason
        batch = BatchInfo(self._batch.id, self._size, self._rows, reason, 0.0, run_ms)
        outputs: Tensors | Exception = run.error or {
            spec.name: run.values[spec.name]
            for spec in member.package.signature.outputs
            if spec.name in run.values
        }
        stages = tuple(run.stages)
        return Answer(member, outputs, batch, run.started_at, ended_at, stages=stages)

    def close(self) -> None:
        """Wait for nobody any more."""
        for task_id, run in self._runs_by_task.items():
            run.tasks[task_id].subscription.close()

    def _persist(self, ask: Callable[[], T]) -> T:
        """Ask Redis, and wait as long as it takes for one that is away.

        Raises:
          _Stopped: the worker stops.
        """
        while True:
            try:
                return ask()
            except BrokerUnavailable as exc:
                logger.warning("stages of batch %s have to wait: %s", self._batch.id, exc)
                self._check_stop()
                time.sleep(RETRY_S)

    def _check_stop(self) -> None:
        if worker_state.should_stop is None and worker_state.should_terminate is None:
            return
        now = time.monotonic()
        self._stopping_since = self._stopping_since or now
        if now - self._stopping_since >= GRACE_S:
            raise _Stopped
