"""Forward step of an ensemble: answer a batch by submitting tasks to its stages' models.

Each stage of each member is an ordinary durable task in its model's own lane, so it shares batches
with all other tasks there:

    ready stages of all members --submit--> lanes ... outcomes --> values --> more ready stages

Members do not wait for each other. The task id of a stage is derived from the ensemble's task and
the stage's name: when this worker ends, the next holder of the ensemble's task finds the stages in
progress, and continues.

It runs in a thread of the worker's pool, one for each batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from celery.worker import state as worker_state

from inferno.errors import BrokerUnavailable, InfernoError, ResultExpired, TaskCancelled
from inferno.names import stage_task_id
from inferno.protocol.tasks import BatchInfo
from inferno.protocol.tensors import Tensors
from inferno.repository.graph import Stage
from inferno.repository.package import Package
from tasks.gateway import Gateway
from tasks.intake.submit import Submission
from tasks.results.bridge import Subscription
from tasks.state.outcomes import Outcome
from workers.batches.forward import Answer
from workers.batches.member import Batch, Member
from workers.ensembles.course import Course, StageTask

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Interval at which Redis is searched for outcomes that were not announced, in seconds.
TICK_S = 1.0
#: Pause before another attempt when Redis is unavailable, in seconds.
RETRY_S = 0.5
#: How long a stopping worker waits for stages, in seconds. It gives back the members that are not
#: answered by then, and another worker continues.
GRACE_S = 2.0


class _Stopped(Exception):
    """This worker stops, and others continue."""


class Ensemble:
    """One loaded ensemble; it takes the place of an engine and computes nothing itself."""

    #: An ensemble has no weights.
    memory_bytes = 0

    def __init__(self, package: Package, gateway: Gateway) -> None:
        """Store the package; an ensemble has nothing to load."""
        self.package = package
        self._gateway = gateway

    def predict(self, rows: int) -> float:
        """Return 0 for unknown: the time depends on the other tasks in the stages' lanes."""
        return 0.0

    def answers(
        self, batch: Batch, members: Sequence[Member], resumed: Container[str]
    ) -> Iterator[list[Answer]]:
        """Yield the answers of members, as they become ready.

        Ends early when the worker stops. Members without an answer must be given back then.

        Args:
          batch: the batch of the members.
          members: all members of the batch, or fewer.
          resumed: ids of tasks that a worker has begun before.
        """
        courses = _Courses(self._gateway, batch, members)
        try:
            courses.resume(resumed)
            while courses.by_task:
                courses.begin()
                if answers := courses.answers():
                    yield answers
                else:
                    courses.wait()
        except _Stopped:
            logger.info("%d tasks are left for another worker", len(courses.by_task))
        finally:
            courses.close()


class _Courses:
    """The courses of one batch; they belong to one thread."""

    def __init__(self, gateway: Gateway, batch: Batch, members: Sequence[Member]) -> None:
        self._gateway = gateway
        self._batch = batch
        self._rows = sum(member.rows for member in members)
        self._size = len(members)
        #: Courses that are not answered yet, by the ids of the ensemble's tasks.
        self.by_task = {str(member.request.id): Course.of(member) for member in members}
        #: Courses by the task ids of their stages in progress.
        self._by_stage_task: dict[str, Course] = {}
        #: Outcomes of stages. Other threads add them: those of the bridge and the deadlines.
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._next_look = time.monotonic() + TICK_S
        self._stopping_since: float | None = None

    def resume(self, resumed: Container[str]) -> None:
        """Continue the stages that another worker has begun."""
        begun = {
            stage_task_id(course.task_id, stage.name): (course, stage)
            for course in self.by_task.values()
            if course.task_id in resumed
            for stage in course.left
        }
        if not begun:
            return
        records = self._persist(lambda: self._gateway.records.records(list(begun)))
        outcomes = self._persist(lambda: self._gateway.records.outcomes(list(begun)))
        for (task_id, (course, stage)), record in zip(begun.items(), records, strict=True):
            if record is None:
                continue
            outcome = outcomes.get(task_id)
            if outcome is None and record.state.terminal:
                course.fail(stage, ResultExpired("its result was deleted before it was used"))
                continue
            # The outcome is announced to the worker that submitted the stage, so subscribe to it.
            self._join(course, stage, task_id, self._gateway.bridge.subscribe)
            if outcome is not None:
                self._outcomes.put(outcome)

    def begin(self) -> None:
        """Submit all stages that can begin."""
        ready = [
            (course, stage)
            for course in self.by_task.values()
            if course.error is None
            for stage in course.ready()
        ]
        submissions: list[Submission] = []
        submitted: list[tuple[Course, Stage]] = []
        for course, stage in ready:
            try:
                submissions.append(self._submission(course, stage))
                submitted.append((course, stage))
            except InfernoError as error:
                course.fail(stage, error)
        if submissions:
            self._submit(submissions, submitted)

    def _submission(self, course: Course, stage: Stage) -> Submission:
        """Return the submission of a stage.

        Raises:
          DeadlineExceeded: the member's deadline is over.
          ModelNotFound: the stage's model is gone.
        """
        request, inputs = course.request(stage)
        package, generation = self._gateway.catalog.choose(stage.model, stage.version)
        task_id = stage_task_id(course.task_id, stage.name)
        return Submission(request, package, inputs, task_id, course.task_id, generation)

    def _submit(self, submissions: list[Submission], ready: list[tuple[Course, Stage]]) -> None:
        """Submit stages together."""
        for one, (course, stage) in zip(submissions, ready, strict=True):
            self._join(course, stage, one.task_id, self._gateway.bridge.expect)
        answers = self._persist(lambda: self._gateway.submit_all(submissions))
        for one, (course, stage), answer in zip(submissions, ready, answers, strict=True):
            if isinstance(answer, InfernoError):
                self._part(course, one.task_id)
                course.fail(stage, answer)
            elif isinstance(answer, Exception):
                raise answer
            elif answer.outcome is not None:
                self._outcomes.put(answer.outcome)

    def _join(
        self,
        course: Course,
        stage: Stage,
        task_id: str,
        listen: Callable[[str, Callable[[Outcome], None]], Subscription],
    ) -> None:
        """Note that a stage is in progress, and listen for its outcome."""
        course.left.remove(stage)
        self._by_stage_task[task_id] = course
        course.tasks[task_id] = StageTask(
            stage, time.monotonic(), listen(task_id, self._outcomes.put)
        )

    def _part(self, course: Course, task_id: str) -> None:
        """Forget a stage in progress."""
        del self._by_stage_task[task_id]
        course.tasks.pop(task_id).subscription.close()

    def wait(self) -> None:
        """Return when a stage is over, or after a while.

        Raises:
          _Stopped: the worker stops.
        """
        try:
            self._take(self._outcomes.get(timeout=max(self._next_look - time.monotonic(), 0)))
            while True:
                # Outcomes of one batch come together.
                self._take(self._outcomes.get_nowait())
        except Empty:
            pass
        self._check_stop()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + TICK_S
            with suppress(BrokerUnavailable):
                self._look()

    def _take(self, outcome: Outcome) -> None:
        course = self._by_stage_task.pop(outcome.task_id, None)
        if course is not None and course.error is None:
            course.take(outcome)

    def _look(self) -> None:
        """Search Redis for stages that Celery itself has ended, and for cancelled members."""
        over = self._gateway.records.outcomes([*self._by_stage_task, *self.by_task])
        for task_id, outcome in over.items():
            if task_id in self.by_task:
                # The member is settled already, so its answer will be dropped.
                self.by_task[task_id].error = TaskCancelled("it was cancelled")
            else:
                self._take(outcome)

    def answers(self) -> list[Answer]:
        """Return the answers of members that are over, and forget these members."""
        over = [course for course in self.by_task.values() if course.over]
        for course in over:
            del self.by_task[course.task_id]
            self._cancel_stages(course)
        return [self._answer(course) for course in over]

    def _cancel_stages(self, course: Course) -> None:
        """Cancel the stages of a failed member. Best effort: a running stage finishes unused."""
        for task_id in list(course.tasks):
            if task_id in self._by_stage_task:
                self._part(course, task_id)
            with suppress(InfernoError):
                self._gateway.control.cancel(task_id)

    def _answer(self, course: Course) -> Answer:
        ended_at = time.time()
        run_ms = round((ended_at - course.started_at) * 1000, 3)
        reason = self._batch.reason
        batch = BatchInfo(self._batch.id, self._size, self._rows, reason, 0.0, run_ms)
        outputs: Tensors | Exception = course.error or course.outputs()
        stages = tuple(course.stages)
        return Answer(course.member, outputs, batch, course.started_at, ended_at, stages=stages)

    def close(self) -> None:
        """Stop listening for stages in progress."""
        for task_id, course in self._by_stage_task.items():
            course.tasks[task_id].subscription.close()

    def _persist(self, ask: Callable[[], T]) -> T:
        """Ask Redis, and retry for as long as it is unavailable.

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
