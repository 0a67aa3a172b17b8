"""The one door to the queue, as ensembles use it; web processes are tested with their routes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from msgspec.structs import replace

from inferno.errors import BrokerUnavailable, DeadlineExceeded, KeyReused, ModelNotFound
from inferno.protocol.requests import InferRequest
from inferno.testing.processes import wait_until
from tasks.gateway import Gateway
from tasks.intake.submit import Accepted, Submission, new_task_id
from tasks.state.transitions import Idempotency


@pytest.fixture
def gateway(repository, celery, client, settings):
    for version in (1, 2):
        repository.add("stage", version)
    gateway = Gateway.build(celery, client, settings, "inferno-test")
    yield gateway
    gateway.control.purge("stage", gateway.control.lanes.backlog("stage").total)
    for version in (1, 2):
        serve(gateway, version)
    gateway.deadlines.stop()
    gateway.bridge.stop()


def serve(gateway, version, withdrawn=False):
    def edit(now):
        return replace(
            now, withdrawn=now.withdrawn | {version} if withdrawn else now.withdrawn - {version}
        )

    gateway.deployments.change("stage", edit)


def submission(gateway, version=None, **options):
    package, generation = gateway.catalog.choose("stage", version)
    request = InferRequest(None, "stage", version, **options)
    inputs = {"text": np.array(["a"], object)}
    return Submission(request, package, inputs, new_task_id(), "parent", generation)


def test_tasks_are_submitted_together_and_once(gateway):
    tasks = [submission(gateway) for _ in range(3)]
    for _ in range(2):
        answers = gateway.submit_all(tasks)
        assert [answer.task_id for answer in answers] == [one.task_id for one in tasks]
    assert gateway.control.lanes.backlog("stage").total == 3


def test_an_outdated_choice_is_made_again(gateway):
    free, bound = submission(gateway), submission(gateway, version=2)
    assert free.package.version == 2
    serve(gateway, 2, withdrawn=True)
    accepted, refused = gateway.submit_all([free, bound])
    assert isinstance(accepted, Accepted)
    assert (accepted.task_id, accepted.version) == (free.task_id, 1)
    assert isinstance(refused, ModelNotFound)
    assert gateway.control.lanes.backlog("stage").total == 1


def test_a_task_that_no_worker_takes_ends_at_its_deadline(gateway):
    one = submission(gateway, timeout_ms=50)
    began = time.time()
    with gateway.expect(one.task_id) as waiter:
        gateway.submit_all([one])
        outcome = waiter.wait(20)
    assert isinstance(outcome.error, DeadlineExceeded)
    assert time.time() - began < 10


def test_stages_and_repeated_requests_are_not_refused_by_a_nearly_full_redis(gateway, client):
    stage, once = submission(gateway), Idempotency("nearly-full", "body")
    valid = gateway.validate(InferRequest({"text": ["a"]}, "stage"))
    task = gateway.publish(valid, idempotency=once)
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_000_000)
    try:
        wait_until(lambda: refuses(gateway, valid))
        (accepted,) = gateway.submit_all([stage])
        assert isinstance(accepted, Accepted)
        assert gateway.publish(valid, idempotency=once).task_id == task.task_id
        with pytest.raises(KeyReused):
            gateway.publish(valid, idempotency=Idempotency("nearly-full", "another"))
        # What makes room is not refused, and neither is a lane that waits.
        gateway.control.lanes.pause("stage")
        gateway.control.cancel(task.task_id)
        assert gateway.control.purge("stage", 1) == 1
        gateway.control.lanes.resume("stage")
    finally:
        client.config_set("maxmemory", 0)
    wait_until(lambda: not refuses(gateway, valid))


def refuses(gateway, valid):
    try:
        gateway.control.cancel(gateway.publish(valid).task_id)
    except BrokerUnavailable:
        return True
    return False
