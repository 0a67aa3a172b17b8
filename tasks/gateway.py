"""The one door to the queue: validate a request, publish its task, wait for the outcome.

Web processes and ensemble workers submit through it, so that every task passes the same checks::

    validate --> publish --> lane ... worker ... outcome --> wait

It covers the steps submit and deliver of a task, on the thread of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import msgspec
import redis
from celery import Celery

from inferno import names
from inferno.errors import InvalidInput, ModelNotFound, ModelUnavailable, Overloaded
from inferno.protocol.limits import Limits
from inferno.protocol.requests import InferRequest
from inferno.protocol.tensors import Tensors
from inferno.protocol.webhooks import check_reach
from inferno.repository.package import Package
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.control.deadlines import Deadlines, is_late
from tasks.control.tasks import Control
from tasks.intake.catalog import Catalog
from tasks.intake.submit import Accepted, Submission, Submitter
from tasks.results.bridge import Bridge, Waiter
from tasks.state.cluster import Cluster
from tasks.state.deployments import Deployments, Outdated
from tasks.state.outcomes import Outcome
from tasks.state.records import Record, Records
from tasks.state.transitions import Idempotency


class Valid(NamedTuple):
    """A request that may be published."""

    request: InferRequest
    #: Version that answers.
    package: Package
    inputs: Tensors
    #: Deployment generation under which the version was chosen.
    generation: int


@dataclass(frozen=True)
class Gateway:
    """Submits tasks and waits for them, with everything that this takes."""

    settings: Settings
    limits: Limits
    client: redis.Redis
    deployments: Deployments
    catalog: Catalog
    cluster: Cluster
    records: Records
    submitter: Submitter
    control: Control
    bridge: Bridge
    deadlines: Deadlines

    @classmethod
    def build(cls, app: Celery, client: redis.Redis, settings: Settings, name: str) -> Gateway:
        """Read the model repository and build the objects of a process; no connection is opened.

        Args:
          app: Celery app whose broker carries the lanes.
          client: Redis that holds the records.
          settings: the platform's settings.
          name: name of the connection for results, as Redis lists it.
        Raises:
          PackageError: the model repository cannot be read.
        """
        deployments, records = Deployments(client, settings), Records(client, settings)
        control = Control(app, client, settings)
        bridge = Bridge(client, records, settings.redis.prefix, name)
        return cls(
            settings=settings,
            limits=Limits.of(settings.limits),
            client=client,
            deployments=deployments,
            catalog=Catalog(deployments, settings),
            cluster=Cluster(client, settings),
            records=records,
            submitter=Submitter(app, client, settings),
            control=control,
            bridge=bridge,
            deadlines=Deadlines(bridge, records, control),
        )

    def close(self) -> None:
        """Stop the threads and close every connection."""
        self.deadlines.stop()
        self.bridge.stop()
        self.client.close()

    # -- Submit ------------------------------------------------------------------------------------

    def validate(self, request: InferRequest) -> Valid:
        """Choose the version that answers, and check the inputs against its signature.

        Raises:
          ModelNotFound: no such model or version.
          InvalidField: the webhook's URL is not allowed.
          InvalidInput: an input does not match the signature; names the field.
        """
        if request.webhook is not None and not self.settings.webhooks.allow_private:
            check_reach(request.webhook)
        package, generation = self.catalog.choose(request.model, request.version, request.sticky)
        inputs = request.arrays(package.signature, self.limits)
        if package.manifest.batching.oversized == "refuse" and package.signature.batched:
            most = package.max_batch_size(self.settings.batching.max_batch_size)
            rows = max(len(array) for array in inputs.values())
            if rows > most:
                raise InvalidInput(f"expected at most {most} rows, got {rows}", "inputs")
        return Valid(request, package, inputs, generation)

    def require_worker(self, package: Package, idempotency: Idempotency | None = None) -> None:
        """Refuse a call that would wait for workers that are not there.

        Args:
          package: version that answers; an ensemble needs the models of its stages as well.
          idempotency: a call that repeats an earlier one needs no worker.
        Raises:
          ModelUnavailable: no ready worker serves one of the models; names it.
          BrokerUnavailable: Redis does not answer.
        """

        def serves(model: str) -> bool:
            # A model may have become ready since the cached read of the reports.
            return self.cluster.serves(model) or self.cluster.serves(model, 0.0)

        missing = self.catalog.repository.missing(package, serves)
        if missing and not (idempotency and self.submitter.earlier(idempotency)):
            model = missing[0]
            raise ModelUnavailable(
                f"no live worker serves {model}; start one with: inferno worker {model}", "model"
            )

    def submit(
        self,
        request: InferRequest,
        idempotency: Idempotency | None = None,
        task_id: str | None = None,
    ) -> Accepted:
        """Validate a request and publish its task.

        Args:
          request: what the client asked for.
          idempotency: as `publish`.
          task_id: as `publish`.
        Raises:
          RequestError: the request is wrong.
          ServingError: as `publish`.
        """
        return self.publish(self.validate(request), task_id, idempotency)

    def publish(
        self,
        valid: Valid,
        task_id: str | None = None,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        """Publish the task of a validated request, unless it could not start in time.

        Args:
          valid: what `validate` returned; the request is validated again if another version
            answers by now.
          task_id: id of the new task, if the caller already expects its outcome.
          idempotency: returns the earlier task if there is one.
        Raises:
          KeyReused: the idempotency key belongs to another request.
          Overloaded: the predicted wait is longer than the deadline.
          BrokerUnavailable: Redis does not answer; the task was not accepted.
          RequestError: the version that answers by now does not take the request.
        """
        while True:
            try:
                task = self._publish(valid, task_id, idempotency)
            except Outdated:
                self.catalog.refresh(packages=False)
                valid = self.validate(valid.request)
            else:
                break
        if task.replayed:
            return self._earlier(task)
        if task_id is not None and task.outcome is None:
            self.deadlines.watch(task_id, task.deadline)
        return task

    def submit_all(self, submissions: Sequence[Submission]) -> list[Accepted | Exception]:
        """Publish tasks together whose outcomes the caller already expects.

        Tasks that are known stay as they are, so that it is safe to call this again. A version
        that was chosen under an outdated deployment generation is chosen again.

        Args:
          submissions: the tasks.
        Returns:
          for each its task, or why it was refused.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        answers: dict[str, Accepted | Exception] = {}
        left = list(submissions)
        while left:
            answered = self.submitter.submit_all(left, self.bridge.reply_to)
            outdated = []
            for one, answer in zip(left, answered, strict=True):
                if isinstance(answer, Outdated):
                    outdated.append(one)
                    continue
                answers[one.task_id] = answer
                if isinstance(answer, Accepted) and answer.outcome is None:
                    self.deadlines.watch(one.task_id, answer.deadline)
            if outdated:
                self.catalog.refresh(packages=False)
            left = []
            for one in outdated:
                try:
                    package, generation = self.catalog.choose(
                        one.request.model, one.request.version, one.request.sticky
                    )
                except ModelNotFound as error:
                    answers[one.task_id] = error
                else:
                    again = msgspec.structs.replace(one, package=package, generation=generation)
                    left.append(again)
        return [answers[one.task_id] for one in submissions]

    def _publish(
        self, valid: Valid, task_id: str | None, idempotency: Idempotency | None
    ) -> Accepted:
        request, package, inputs, generation = valid
        tasks = self.settings.tasks
        deadline_s = (request.timeout_ms or tasks.timeout_ms or 0.0) / 1000
        refuses = deadline_s and tasks.refuse_hopeless
        speed = self.cluster.speed(package.name) if refuses else None
        try:
            return self.submitter.submit(
                request,
                package,
                inputs,
                task_id,
                idempotency=idempotency,
                most_waiting=None if speed is None else speed.most_waiting(deadline_s),
                reply_to=None if task_id is None else self.bridge.reply_to,
                generation=generation,
            )
        except Overloaded as exc:
            assert speed is not None
            wait_s = speed.wait_s(exc.waiting)
            error = Overloaded(
                f"{exc.waiting} tasks are ahead of this one: it would wait for about "
                f"{wait_s:.1f} s, and has to start within {deadline_s:g} s",
                "timeout_ms",
            )
            error.retry_after_s = max(math.ceil(wait_s - deadline_s), 1)
            raise error from None

    def _earlier(self, task: Accepted) -> Accepted:
        """Return a replayed task with the facts of its record."""
        record, _ = self.records.fetch(task.task_id)
        if record is None:
            return task
        return msgspec.structs.replace(
            task,
            version=record.version,
            accepted_at=record.accepted_at,
            deadline=record.deadline,
        )

    # -- Wait --------------------------------------------------------------------------------------

    def expect(self, task_id: str) -> Waiter:
        """Return a waiter for a task that is about to be published under this id."""
        return Waiter(self.bridge, task_id, expected=True)

    def fetch(self, task_id: str, wait_s: float = 0.0) -> tuple[Record | None, Outcome | None]:
        """Return a task's record and outcome, each None if Redis does not have it.

        A task whose deadline has passed before a worker fetched it is ended first.

        Args:
          task_id: the task.
          wait_s: how long to wait for its end, in seconds.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        record, outcome = self.records.fetch(task_id)
        if record is not None and is_late(record):
            self.control.expire(record)
            record, outcome = self.records.fetch(task_id)
        if wait_s and outcome is None and record is not None and not record.state.terminal:
            with Waiter(self.bridge, task_id) as waiter:
                self.deadlines.watch(task_id, record.deadline)
                waiter.wait(wait_s)
            record, outcome = self.records.fetch(task_id)
        return record, outcome

    def records_of(self, task_ids: Sequence[str]) -> list[Record | None]:
        """Return the records of tasks in one round trip; None for a task without a record.

        Late tasks are ended first, as by `fetch`.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        found = self.records.records(task_ids)
        late = [record for record in found if record is not None and is_late(record)]
        for record in late:
            self.control.expire(record)
        return self.records.records(task_ids) if late else found

    def listeners(self, task_id: str) -> int:
        """Return how many processes listen to the channel of a task's result.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated():
            counts = self.client.pubsub_numsub(names.result_key(task_id))
        return cast(list[tuple[bytes, int]], counts)[0][1]
