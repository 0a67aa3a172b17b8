"""Large inputs, which are beside the record until the task is over: real workers, a real Redis."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from celery import Celery

from inferno import names
from inferno.errors import InputsLost, InvalidInput, PayloadGone, TaskNotFound, WorkerLost
from inferno.protocol.limits import Limits
from inferno.protocol.requests import InferRequest
from inferno.protocol.tasks import TaskState
from inferno.protocol.tensors import Binary
from inferno.repository.repository import Repository as Packages
from inferno.settings import Settings
from inferno.testing.processes import wait_until, web
from tasks.control.tasks import Control
from tasks.intake.submit import Submitter
from tasks.state.outcomes import Outcome
from tasks.state.records import Record, Records
from tests.integration.conftest import occupied, send
from tests.integration.tasks.test_control import LONG_PAUSE
from tests.pictures import png_header

LARGE = 100_000

#: Says what it was given.
DIGEST = """
import hashlib
import numpy as np

def build(context):
    def model(inputs):
        images = [hashlib.sha256(image).hexdigest() for image in inputs["image"]]
        return {"sha256": np.array(images, dtype=object), "sum": inputs["x"].sum(axis=1)}
    return model
"""

DIGEST_SIGNATURE = {
    "inputs": [
        {"name": "image", "dtype": "bytes", "shape": ["batch"]},
        {"name": "x", "dtype": "float32", "shape": ["batch", "width"]},
    ],
    "outputs": [
        {"name": "sha256", "dtype": "string", "shape": ["batch"]},
        {"name": "sum", "dtype": "float32", "shape": ["batch"]},
    ],
}

Submit = Callable[..., str]


def large(text: str) -> list[str]:
    """Return a behaviour of the model, for the first of two rows, and much besides."""
    return [text, "x" * LARGE]


@pytest.fixture
def submit(celery: Celery, client: redis.Redis, settings: Settings) -> Submit:
    """Submit texts, or other inputs, as the web tier does; returns the task's id."""

    def submit(model: str, inputs: Any, claim_bytes: int = LARGE - 1, **fields: Any) -> str:
        tasks = settings.tasks.model_copy(update={"claim_bytes": claim_bytes})
        submitter = Submitter(celery, client, settings.model_copy(update={"tasks": tasks}))
        package = Packages.read(settings.repository).model(model).package()
        named = inputs if isinstance(inputs, dict) else {"text": inputs}
        request = InferRequest(model=model, inputs=named, **fields)
        arrays = request.arrays(package.signature, Limits(10**7, 10**7, 100))
        return submitter.submit(request, package, arrays).task_id

    return submit


@pytest.fixture
def claimed(client: redis.Redis, settings: Settings) -> Callable[[str], bool]:
    """Return whether a task's inputs are there; they never are without an end."""

    def claimed(task_id: str) -> bool:
        key = names.claim_key(settings.redis.prefix, task_id)
        ttl_s = client.ttl(key)
        assert ttl_s == -2 or 0 < ttl_s <= settings.tasks.claim_ttl_s
        return ttl_s != -2

    return claimed


@pytest.fixture
def result(records: Records) -> Callable[[str], Outcome]:
    """Wait for a task's outcome."""

    def result(task_id: str) -> Outcome:
        wait_until(lambda: records.fetch(task_id)[1])
        outcome = records.fetch(task_id)[1]
        assert outcome is not None
        return outcome

    return result


@pytest.fixture
def record(records: Records) -> Callable[[str], Record]:
    def record(task_id: str) -> Record:
        found = records.fetch(task_id)[0]
        assert found is not None
        return found

    return record


def texts(outcome: Outcome) -> Any:
    assert outcome.succeeded, outcome.error
    return json.loads(bytes(outcome.result))["outputs"]["text"]["data"]


@pytest.mark.parametrize("claim_bytes", [600_000, 0], ids=["claimed", "inline"])
def test_a_model_is_given_the_same_whichever_way_they_came(
    repository, start_worker, celery, client, submit, claimed, result, claim_bytes
):
    repository.add(
        "large",
        code=DIGEST,
        signature=DIGEST_SIGNATURE,
        warm_up={"inputs": {"image": "AAAA", "x": [1.0]}},
    )
    image = np.random.default_rng(0).bytes(600_000)
    x = np.arange(3, dtype="<f4")
    inputs = {"image": Binary(image), "x": Binary(x.tobytes(), (1, 3))}
    task_id = submit("large", inputs, claim_bytes)
    ((_, fields),) = client.xrange("stream:large:0")
    assert claimed(task_id) == (claim_bytes > 0)
    assert (len(fields[b"message"]) < 2000) == (claim_bytes > 0)
    inline = {"image": [base64.b64encode(image).decode()], "x": [[0.0, 1.0, 2.0]]}
    with start_worker("large"):
        # Sent by a client that knows nothing of claims.
        other = celery.send_task("infer.large", kwargs={"inputs": inline}, queue="large")
        outputs = json.loads(bytes(result(task_id).result))["outputs"]
        assert other.get(timeout=20)["outputs"] == outputs
    assert outputs["sum"]["data"] == [3.0]
    assert not claimed(task_id)
    assert not claimed(other.id)


def test_a_large_image_goes_through_the_platform(
    repository, start_worker, env, log, client, tmp_path
):
    signature = {
        "inputs": [
            {"name": "image", "dtype": "bytes", "shape": ["batch"], "content": "image"},
            {"name": "x", "dtype": "float32", "shape": ["batch", "width"], "optional": True},
        ],
        "outputs": DIGEST_SIGNATURE["outputs"][:1],
    }
    code = DIGEST.replace(', "sum": inputs["x"].sum(axis=1)', "")
    header = png_header(3, 2)
    pixel = base64.b64encode(header).decode()
    repository.add("image", code=code, signature=signature, warm_up={"inputs": {"image": pixel}})
    body = header + bytes(600_000)
    with start_worker("image"), web(env, tmp_path / "web.log") as address:
        url = f"http://{address}/v1/models/image:predict"
        binary = httpx.post(url, content=body, headers={"Content-Type": "image/png"}, timeout=30)
        inputs = {"image": base64.b64encode(body).decode()}
        in_json = httpx.post(url, json={"inputs": inputs}, timeout=30)
    assert (binary.status_code, in_json.status_code) == (200, 200), binary.text
    assert binary.json()["outputs"] == in_json.json()["outputs"]
    assert not client.keys("inferno:claim:*")


def test_inputs_up_to_the_limit_stay_in_the_message(repository, submit, claimed):
    repository.add("small")
    assert not claimed(submit("small", "x" * LARGE, claim_bytes=LARGE))
    assert claimed(submit("small", "x" * (LARGE + 1), claim_bytes=LARGE))


@pytest.mark.parametrize("broker", ["redis"])
def test_on_another_broker_they_stay_in_the_message(
    repository, start_worker, submit, claimed, result, broker
):
    repository.add("elsewhere")
    task_id = submit("elsewhere", large("here"))
    assert not claimed(task_id)
    with start_worker("elsewhere"):
        assert texts(result(task_id)) == large("here")


def test_they_are_there_for_another_attempt(
    repository, start_worker, submit, claimed, result, record
):
    repository.add("again")
    with start_worker("again"):
        task_id = submit("again", large("once:more"))
        assert texts(result(task_id)) == large("once:more")
    assert record(task_id).attempts == 2
    assert not claimed(task_id)


def test_they_are_there_for_the_worker_that_takes_over(
    repository, start_worker, submit, claimed, result, record, tmp_path
):
    repository.add("killed")
    gate = tmp_path / "gate"
    with start_worker("killed") as victim:
        task_id = submit("killed", large(f"hold:{gate}"))
        wait_until(repository.ran)
        victim.kill()
    assert claimed(task_id)
    gate.touch()
    with start_worker("killed"):
        assert texts(result(task_id)) == large(f"hold:{gate}")
    assert record(task_id).attempts == 2
    assert not claimed(task_id)


def test_they_are_there_for_the_replay_of_a_dead_letter(
    repository,
    start_worker,
    control,
    dead,
    replay,
    submit,
    claimed,
    result,
    client,
    settings,
    tmp_path,
):
    repository.add("dead", retries={"max_retries": 1, "backoff_s": 0.1})
    healed = tmp_path / "healed"
    asked = large(f"until:{healed}")
    with start_worker("dead"):
        first, second = submit("dead", asked), submit("dead", asked)
        assert not result(first).succeeded
        assert not result(second).succeeded
        assert claimed(first)
        letter = dead.show(first)
        assert len(json.dumps(letter.payload)) < 2000
        tensor = {"dtype": "string", "shape": [2], "data": asked}
        assert dead.asked(letter)["inputs"] == {"text": tensor}
        # A letter is discarded with its inputs; what has none is left alone.
        dead.discard(second)
        assert not claimed(second)
        healed.touch()
        retried = replay.retry(first).task_id
        assert texts(result(retried)) == asked
        replayed = replay.replay(letter).task_id
        assert texts(result(replayed)) == asked
        # Asked again, it says what has been made of it.
        assert replay.replay(letter).task_id == replayed
    assert not any(map(claimed, (first, second, retried, replayed)))


def test_a_letter_whose_inputs_are_gone_is_not_replayed(
    repository, start_worker, dead, replay, submit, claimed, result, client, settings, env
):
    env["INFERNO_TASKS__MAX_ATTEMPTS"] = "1"
    repository.add("gone")
    with start_worker("gone") as victim:
        task_id = submit("gone", large("kill"))
        wait_until(lambda: victim.poll() is not None)
    with start_worker("gone"):
        # It gives the task up, and has never read its inputs.
        assert isinstance(result(task_id).error, WorkerLost)
    letter = dead.show(task_id)
    assert dead.asked(letter)["inputs"]["text"]["data"] == large("kill")
    assert claimed(task_id)
    client.delete(names.claim_key(settings.redis.prefix, task_id))
    assert dead.asked(letter) == letter.payload
    with pytest.raises(PayloadGone):
        replay.replay(letter)
    assert dead.show(task_id) == letter


def test_a_discard_touches_no_task_under_way(repository, dead, submit, claimed):
    repository.add("alive")
    task_id = submit("alive", large("waits"))
    with pytest.raises(TaskNotFound):
        dead.discard(task_id)
    assert claimed(task_id)


def test_they_go_with_a_task_that_never_runs(
    repository, start_worker, control, submit, claimed, record, records
):
    repository.add("never", retries=LONG_PAUSE)
    cancelled, expired = submit("never", large("a")), submit("never", large("b"), timeout_ms=1)
    control.cancel(cancelled)
    wait_until(lambda: control.expire(record(expired)))
    retrying, purged = submit("never", large("once:c")), submit("never", large("d"))
    assert claimed(retrying)
    assert claimed(purged)
    control.lanes.pause("never")
    assert control.purge("never", 2) == 2
    assert not any(map(claimed, (cancelled, expired, retrying, purged)))
    # A worker drops what comes too late.
    control.lanes.resume("never")
    late = submit("never", large("late"), timeout_ms=1)
    with start_worker("never"):
        wait_until(lambda: record(late).state is TaskState.EXPIRED)
        waits = submit("never", large("once:wait"))
        wait_until(lambda: record(waits).state is TaskState.RETRYING)
        assert claimed(waits)
        control.cancel(waits)
    assert not claimed(late)
    assert not claimed(waits)


def test_they_go_when_a_running_task_is_cancelled(
    repository, start_worker, celery, control, submit, claimed, record, tmp_path
):
    repository.add("running")
    gate = tmp_path / "gate"
    with start_worker("running"):
        task_id = submit("running", large(f"hold:{gate}"))
        wait_until(repository.ran)
        control.cancel(task_id)
        assert not claimed(task_id)
        gate.touch()
        send(celery, "running", "next").get(timeout=10)
    assert record(task_id).state is TaskState.CANCELLED


def test_they_are_kept_where_the_settings_say_so(
    repository, start_worker, celery, client, settings, submit, claimed, result, env, replay
):
    repository.add("kept")
    env["INFERNO_TASKS__KEEP_PAYLOADS"] = "always"
    tasks = settings.tasks.model_copy(update={"keep_payloads": "always"})
    keeping = Control(celery, client, settings.model_copy(update={"tasks": tasks}))
    cancelled = submit("kept", large("cancelled"))
    keeping.cancel(cancelled)
    with start_worker("kept"):
        done = submit("kept", large("done"))
        result(done)
        key = names.claim_key(settings.redis.prefix, done)
        assert client.ttl(key) <= settings.tasks.result_ttl_s
        again = [replay.retry(task_id).task_id for task_id in (cancelled, done)]
        assert [texts(result(task_id)) for task_id in again] == [
            large("cancelled"),
            large("done"),
        ]
        client.delete(key)
        with pytest.raises(PayloadGone):
            replay.retry(done)


def test_a_task_whose_inputs_are_lost_fails_alone(
    repository, start_worker, celery, client, settings, submit, result
):
    repository.add("lost", batching={"max_batch_size": 8})
    with start_worker("lost"):
        with occupied(celery, "lost", repository) as wait_for:
            tasks = [submit("lost", "x" * LARGE + str(n)) for n in range(3)]
            tasks.append(submit("lost", "small"))
            client.delete(names.claim_key(settings.redis.prefix, tasks[1]))
            client.set(names.claim_key(settings.redis.prefix, tasks[2]), b"odd")
            wait_for(4)
        outcomes = [result(task_id) for task_id in tasks]
    assert isinstance(outcomes[1].error, InputsLost)
    assert isinstance(outcomes[2].error, InvalidInput)
    assert texts(outcomes[0]) == ["x" * LARGE + "0"]
    assert texts(outcomes[3]) == ["small"]


def test_an_odd_claim_is_refused(repository, start_worker, celery):
    claims = [None, {}, {"text": 1}, {"text": [0]}, {"text": [10**12] * 5}]
    repository.add("odd")
    with start_worker("odd"):
        for claim in claims:
            odd = celery.send_task("infer.odd", kwargs={"claim": claim}, queue="odd")
            with pytest.raises(InvalidInput):
                odd.get(timeout=10)
        never_kept = celery.send_task("infer.odd", kwargs={"claim": {"text": [1]}}, queue="odd")
        with pytest.raises(InputsLost):
            never_kept.get(timeout=10)
        assert send(celery, "odd", "fine").get(timeout=10)


def test_followers_and_answers_from_the_cache_leave_none(
    repository, start_worker, celery, submit, claimed, result, client
):
    client.flushall()
    repository.add("shared", deterministic=True)
    with start_worker("shared"):
        wait_until(lambda: client.hexists("inferno:packages", "shared/1"))
        with occupied(celery, "shared", repository):
            same = [submit("shared", "x" * LARGE) for _ in range(3)]
            assert all(map(claimed, same))
        assert [texts(result(task_id)) for task_id in same] == [["x" * LARGE]] * 3
        cached = submit("shared", "x" * LARGE)
        assert texts(result(cached)) == ["x" * LARGE]
    assert sum(len(text) == LARGE for text in repository.ran()) == 1
    assert not any(map(claimed, [*same, cached]))


def test_disbanded_followers_keep_theirs(
    repository, start_worker, control, submit, claimed, result
):
    repository.add("disbanded", deterministic=True)
    leader, follower = (submit("disbanded", "y" * LARGE) for _ in range(2))
    control.cancel(leader)
    assert not claimed(leader)
    assert claimed(follower)
    with start_worker("disbanded"):
        assert texts(result(follower)) == ["y" * LARGE]
    assert not claimed(follower)


def test_their_time_begins_anew_with_each_attempt(
    repository, start_worker, client, settings, submit, tmp_path, log
):
    repository.add("long")
    gate: Path = tmp_path / "gate"
    task_id = submit("long", large(f"hold:{gate}"))
    key = names.claim_key(settings.redis.prefix, task_id)
    client.expire(key, 100)
    with start_worker("long"):
        wait_until(repository.ran)
        assert client.ttl(key) > 100
        gate.touch()
        wait_until(lambda: not client.exists(key))
