"""Results that are kept, and tasks that share one computation: real workers, a real web tier."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import websocket

from inferno.client import Client
from inferno.protocol.limits import UNLIMITED, Limits
from inferno.protocol.requests import parse_predict
from inferno.protocol.tasks import TaskState
from inferno.repository.repository import Repository as Models
from inferno.testing.processes import wait_until, web
from tasks.broker.lanes import Lanes
from tasks.intake.convoy import Convoy
from tasks.intake.submit import Submitter
from tasks.state.kept_results import Cache
from tasks.state.statistics import Statistics
from tasks.state.transitions import Idempotency
from tests.integration.conftest import occupied, send
from web.routes.cache import COUNTED

SHARED = {"deterministic": True, "batching": {"max_batch_size": 64}}


@pytest.fixture(autouse=True)
def _empty(client: redis.Redis) -> None:
    client.flushall()


@pytest.fixture
def cache(client, settings) -> Cache:
    return Cache(client, settings)


@pytest.fixture
def serve(env: dict[str, str], tmp_path: Path) -> Callable[..., Any]:
    """Run the web tier; to be used in a `with` statement."""

    @contextmanager
    def run(**more: str) -> Iterator[httpx.Client]:
        settings = env | {"INFERNO_WEBHOOKS__ALLOW_PRIVATE": "true", **more}
        with (
            web(settings, tmp_path / "web.log") as address,
            httpx.Client(
                base_url=f"http://{address}", timeout=30, limits=httpx.Limits(max_connections=100)
            ) as http,
        ):
            yield http

    return run


def predict(http: httpx.Client, model: str, text: str | list[str], **more: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/models/{model}:predict", json={"inputs": {"text": text}, **more})
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def submit(http: httpx.Client, model: str, text: str, **more: Any) -> str:
    answer = http.post("/infer", json={"model": model, "inputs": {"text": text}, **more})
    assert answer.status_code == 202, answer.text
    task_id: str = answer.json()["task_id"]
    return task_id


def result(http: httpx.Client, task_id: str) -> dict[str, Any]:
    document: dict[str, Any] = http.get(f"/tasks/{task_id}?wait=30").json()
    return document


def known(client: redis.Redis, model: str) -> None:
    """Wait until a worker has said what it has loaded."""
    wait_until(lambda: client.hexists("inferno:packages", f"{model}/1"))


def counts(statistics: Statistics, model: str) -> dict[str, int]:
    found = statistics.read(model, 1)
    return {name: getattr(found, name) for name in COUNTED}


def test_sixty_four_equal_calls_are_computed_once(
    repository, start_worker, serve, celery, statistics, records
):
    repository.add("same", **SHARED)
    with start_worker("same"), serve() as http, ThreadPoolExecutor(64) as pool:
        with occupied(celery, "same", repository):
            calls = [pool.submit(predict, http, "same", "text") for _ in range(64)]
            wait_until(lambda: counts(statistics, "same")["coalesced"] == 63)
        answers = [call.result() for call in calls]
    assert repository.ran().count("text") == 1
    # One of them was computed, and before it what kept the worker busy.
    found = statistics.read("same", 1)
    assert (found.success.count, found.cache_hit.count, found.inference_count) == (65, 63, 2)
    assert len({answer["task_id"] for answer in answers}) == 64
    assert len({answer["batch"]["id"] for answer in answers}) == 1
    assert all(answer["outputs"]["text"]["data"] == ["text"] for answer in answers)
    assert not any("cached" in answer for answer in answers)
    for answer in answers:
        record, outcome = records.fetch(answer["task_id"])
        assert record.state is TaskState.SUCCEEDED
        assert outcome.succeeded
        assert answer["timings"]["total_ms"] >= answer["timings"]["inference_ms"]


def test_a_later_equal_call_is_answered_without_its_model(
    repository, start_worker, serve, celery, statistics, client
):
    repository.add("later", **SHARED)
    with start_worker("later"), serve() as http:
        known(client, "later")
        first = predict(http, "later", "text")
        assert "cached" not in first
        second = predict(http, "later", "text")
        assert second["cached"] is True
        assert second["task_id"] != first["task_id"]
        assert second["timings"]["total_ms"] == 0
        assert {k: second[k] for k in ("outputs", "batch", "worker")} == {
            k: first[k] for k in ("outputs", "batch", "worker")
        }
        # It is a task like any other.
        view = result(http, second["task_id"])
        assert (view["status"], view["cached"], view["attempts"]) == ("succeeded", True, 0)
        listed = http.get("/tasks").json()["tasks"]
        assert [task["task_id"] for task in listed] == [second["task_id"], first["task_id"]]
        stored = celery.AsyncResult(second["task_id"]).get(timeout=5)
        assert stored["outputs"] == first["outputs"]
        # So is one that is only submitted, or that comes on a socket.
        accepted = http.post("/infer", json={"model": "later", "inputs": {"text": "text"}}).json()
        assert (accepted["status"], accepted["cached"]) == ("succeeded", True)
        assert result(http, accepted["task_id"])["cached"] is True
        socket = websocket.create_connection(f"ws://{http.base_url.netloc.decode()}/ws")
        socket.send(json.dumps({"type": "submit", "model": "later", "inputs": {"text": "text"}}))
        assert json.loads(socket.recv())["type"] == "accepted"
        assert json.loads(socket.recv())["data"]["cached"] is True
        socket.close()
        prefer = {"Prefer": "wait=10"}
        waited = http.post(
            "/infer", json={"model": "later", "inputs": {"text": "text"}}, headers=prefer
        )
        assert (waited.status_code, waited.json()["cached"]) == (200, True)
        # Other inputs, outputs or numbers are something else.
        assert "cached" not in predict(http, "later", ["text", "text"])
        assert "cached" not in predict(http, "later", "text", codec="base64")
        assert "cached" not in predict(http, "later", "text", outputs=["text"])
    assert repository.ran().count("text") == 5
    assert counts(statistics, "later") == {
        "hits": 4,
        "misses": 4,
        "coalesced": 0,
        "deduplicated": 0,
    }


def test_a_keyed_task_whose_answer_was_lost_is_over_when_it_is_asked_for_again(
    repository, start_worker, serve, celery, client, settings
):
    repository.add("again", **SHARED)
    with start_worker("again"), serve() as http:
        known(client, "again")
        predict(http, "again", "text")
    package = Models.read(settings.repository).model("again").package(1)
    request = parse_predict(b'{"inputs": {"text": "text"}}', "again", UNLIMITED)
    inputs = request.arrays(package.signature, Limits(100, 100, 100))
    submitter = Submitter(celery, client, settings)
    accept, calls = submitter._transitions.accept, []

    def cut(arrivals):
        calls.append(accept(arrivals))
        if len(calls) == 1:
            raise redis.ConnectionError("the answer is lost")
        return calls[-1]

    submitter._arrivals = Convoy(cut)
    task = submitter.submit(request, package, inputs, idempotency=Idempotency("key", "body"))
    assert len(calls) == 2
    assert not task.replayed
    assert task.outcome is not None
    earlier = submitter.submit(request, package, inputs, idempotency=Idempotency("key", "body"))
    assert (earlier.replayed, earlier.task_id) == (True, task.task_id)


def test_a_request_may_insist_on_its_own_computation(
    repository, start_worker, serve, client, cache
):
    repository.add("own", **SHARED)
    with start_worker("own"), serve() as http:
        known(client, "own")
        for _ in range(2):
            assert "cached" not in predict(http, "own", "text", cache=False)
        predict(http, "own", "text")
        said = http.post(
            "/v1/models/own:predict",
            json={"inputs": {"text": "text"}},
            headers={"Cache-Control": "no-cache"},
        )
        assert "cached" not in said.json()
        assert predict(http, "own", "text")["cached"] is True
    assert repository.ran() == ["text"] * 4


def test_a_model_that_does_not_ask_for_it_shares_nothing(
    repository, start_worker, serve, celery, client, statistics
):
    repository.add("plain", batching={"max_batch_size": 64})
    with start_worker("plain"), serve() as http, ThreadPoolExecutor(8) as pool:
        with occupied(celery, "plain", repository) as wait_for:
            calls = [pool.submit(predict, http, "plain", "text") for _ in range(8)]
            wait_for(8)
        assert not any("cached" in call.result() for call in calls)
    assert repository.ran().count("text") == 8
    assert not client.keys("inferno:cache:*")
    assert not client.exists("inferno:packages")
    assert set(counts(statistics, "plain").values()) == {0}


def test_a_changed_package_serves_no_old_results(repository, start_worker, serve, client):
    repository.add("changed", **SHARED)
    # The front end does not look again.
    with serve(INFERNO_REPOSITORY__RECONCILE_INTERVAL_S="3600") as http:
        with start_worker("changed"):
            known(client, "changed")
            predict(http, "changed", "text")
            assert predict(http, "changed", "text")["cached"] is True
            before = client.hget("inferno:packages", "changed/1")
        code = repository.root / "changed" / "1" / "model.py"
        code.write_text(code.read_text() + "# Better than before.\n")
        with start_worker("changed"):
            wait_until(lambda: client.hget("inferno:packages", "changed/1") != before)
            # The web tier has read the old one; what the new one gives is not kept for it.
            for _ in range(2):
                assert "cached" not in predict(http, "changed", "text")
            with serve() as restarted:
                assert "cached" not in predict(restarted, "changed", "text")
                assert predict(restarted, "changed", "text")["cached"] is True
    assert len(repository.ran()) == 4


def test_followers_are_not_forgotten_by_a_worker_that_shares_nothing(
    repository, start_worker, serve, statistics
):
    repository.add("differs", **SHARED)
    with (
        serve() as http,
        leader_and_followers(http, statistics, "differs", "text") as (first, others),
    ):
        # As an operator might, and the web tier has not been told.
        manifest = repository.root / "differs" / "1" / "model.yaml"
        manifest.write_text(manifest.read_text().replace("deterministic: true", ""))
        with start_worker("differs"):
            for task_id in (first, *others):
                assert result(http, task_id)["status"] == "succeeded"
    assert repository.ran() == ["text"] * 4


def test_followers_outlive_the_purge_of_a_leader_that_is_forgotten(
    repository, start_worker, serve, statistics, client, control
):
    repository.add("purged", **SHARED)
    with (
        serve() as http,
        leader_and_followers(http, statistics, "purged", "text") as (first, others),
    ):
        client.delete(f"inferno:task:{first}")
        assert control.purge("purged", 1) == 1
        with start_worker("purged"):
            for task_id in others:
                assert result(http, task_id)["status"] == "succeeded"


@contextmanager
def leader_and_followers(
    http: httpx.Client, statistics: Statistics, model: str, text: str, **leader: Any
) -> Iterator[tuple[str, list[str]]]:
    first = submit(http, model, text, **leader)
    before = counts(statistics, model)["coalesced"]
    followers = [submit(http, model, text) for _ in range(3)]
    assert counts(statistics, model)["coalesced"] == before + 3
    yield first, followers


def test_followers_outlive_the_cancellation_of_their_leader(
    repository, start_worker, serve, celery, statistics
):
    repository.add("cancel", **SHARED)
    with serve() as http, start_worker("cancel"):
        with (
            occupied(celery, "cancel", repository),
            leader_and_followers(http, statistics, "cancel", "text") as (leader, followers),
        ):
            assert http.delete(f"/tasks/{leader}").json()["status"] == "cancelled"
        for task_id in followers:
            assert result(http, task_id)["status"] == "succeeded"
        assert result(http, leader)["status"] == "cancelled"
    # They rode in one batch, in which equal inputs are computed once.
    assert repository.ran().count("text") == 1
    assert counts(statistics, "cancel")["deduplicated"] == 2


def test_followers_outlive_the_deadline_of_their_leader(
    repository, start_worker, serve, celery, statistics
):
    repository.add("expire", **SHARED)
    with serve() as http, start_worker("expire"):
        with (
            occupied(celery, "expire", repository),
            leader_and_followers(http, statistics, "expire", "text", timeout_ms=300) as (
                leader,
                followers,
            ),
        ):
            assert result(http, leader)["status"] == "expired"
        for task_id in followers:
            assert result(http, task_id)["status"] == "succeeded"
    assert repository.ran().count("text") == 1


def test_followers_of_a_leader_that_fails_run_for_themselves(
    repository, start_worker, serve, celery, cache, statistics
):
    repository.add("fail", **SHARED)
    with serve() as http, start_worker("fail"):
        with (
            occupied(celery, "fail", repository),
            leader_and_followers(http, statistics, "fail", "poison") as (leader, followers),
        ):
            pass
        for task_id in (leader, *followers):
            view = result(http, task_id)
            assert (view["status"], view["attempts"]) == ("failed", 1)
    assert counts(statistics, "fail")["hits"] == 0
    assert cache.size() == (0, 0)


def test_followers_get_theirs_when_the_leaders_worker_is_killed(
    repository, start_worker, serve, celery, statistics
):
    repository.add("killed", **SHARED)
    gate = repository.root.parent / "gate"
    with serve() as http, start_worker("killed") as victim:
        with leader_and_followers(http, statistics, "killed", f"hold:{gate}") as (
            leader,
            followers,
        ):
            wait_until(lambda: f"hold:{gate}" in repository.ran())
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        gate.touch()
        with start_worker("killed"):
            for task_id in (leader, *followers):
                assert result(http, task_id)["status"] == "succeeded"
        assert result(http, leader)["attempts"] == 2
    assert len(repository.ran()) == 2


def test_followers_wait_for_the_retries_of_their_leader(repository, start_worker, serve, celery):
    repository.add("again", **SHARED)
    with serve() as http, start_worker("again"):
        with occupied(celery, "again", repository):
            tasks = [submit(http, "again", "once:x") for _ in range(3)]
        views = [result(http, task_id) for task_id in tasks]
    assert [view["status"] for view in views] == ["succeeded"] * 3
    assert repository.ran().count("once:x") == 2


def test_a_follower_is_cancelled_and_expires_alone(
    repository, start_worker, serve, celery, statistics, client
):
    repository.add("alone", **SHARED)
    with serve() as http, start_worker("alone"):
        with (
            occupied(celery, "alone", repository),
            leader_and_followers(http, statistics, "alone", "text") as (leader, followers),
        ):
            late = submit(http, "alone", "text", timeout_ms=100)
            assert counts(statistics, "alone")["coalesced"] == 4
            # No worker has it in hands: whoever waits for it sees to that.
            assert result(http, late)["status"] == "expired"
            assert http.delete(f"/tasks/{followers[0]}").json()["status"] == "cancelled"
            (stream,) = client.keys("inferno:cache:followers:*")
            assert client.xlen(stream) == 2
        assert result(http, followers[0])["status"] == "cancelled"
        for task_id in (leader, *followers[1:]):
            assert result(http, task_id)["status"] == "succeeded"
    assert repository.ran().count("text") == 1
    assert not client.keys("inferno:cache:followers:*")
    assert not client.keys("inferno:cache:leader:*")


def test_the_more_urgent_follow_nobody_less_urgent(
    repository, start_worker, serve, celery, cache, settings, client
):
    repository.add("urgent", **SHARED)
    with serve() as http:
        lanes = Lanes(celery, client, settings)
        first = submit(http, "urgent", "text")
        urgent = submit(http, "urgent", "text", priority=5)
        assert lanes.backlog("urgent").waiting == 2
        others = [submit(http, "urgent", "text", priority=n) for n in (0, 5)]
        assert lanes.backlog("urgent").waiting == 2
        with start_worker("urgent"):
            for task_id in (first, urgent, *others):
                assert result(http, task_id)["status"] == "succeeded"


def test_nobody_follows_a_task_whose_message_is_gone(
    repository, start_worker, serve, celery, cache, settings, client
):
    """As when somebody has emptied the queue with Celery's own command."""
    repository.add("gone", **SHARED)
    with serve() as http:
        tasks = [submit(http, "gone", "text") for _ in range(2)]
        with celery.connection_for_write() as connection:
            connection.default_channel.queue_purge("gone")
        rescue = submit(http, "gone", "text")
        with start_worker("gone"):
            for task_id in (tasks[1], rescue):
                assert result(http, task_id)["status"] == "succeeded"
    assert repository.ran() == ["text"]


def test_whoever_is_answered_by_another_gets_its_webhook(
    repository, start_worker, serve, celery, cache, client
):
    repository.add("hooks", **SHARED)
    url = "http://127.0.0.1:9/told"
    with serve() as http, start_worker("hooks"):
        known(client, "hooks")
        with occupied(celery, "hooks", repository):
            leader = submit(http, "hooks", "text")
            follower = submit(http, "hooks", "text", webhook=url)
        result(http, follower)
        hit = submit(http, "hooks", "text", webhook=url)
        assert result(http, hit)["cached"] is True
        entries = client.xrange("stream:webhooks:0")
        told = [json.loads(json.loads(e[1][b"message"])["body"])[1] for e in entries]
    assert [call["task_id"] for call in told] == [follower, hit]
    assert leader not in {call["task_id"] for call in told}
    for call in told:
        # The delivery reads the time in the task's record.
        assert call["occurred_at"] is None


def test_so_many_results_and_bytes_are_kept(repository, start_worker, serve, client, cache, env):
    repository.add("bounds", **SHARED)
    env["INFERNO_CACHE__MAX_ENTRIES"] = "3"
    env["INFERNO_CACHE__MAX_RESULT_BYTES"] = "2000"
    with start_worker("bounds"), serve() as http:
        known(client, "bounds")
        for n in range(6):
            predict(http, "bounds", f"text {n}")
        entries, size = cache.size()
        assert entries == 3
        assert size == sum(client.strlen(key) for key in client.keys("inferno:cache:kept:*"))
        # Those that would expire first have gone.
        assert "cached" not in predict(http, "bounds", "text 0")
        assert predict(http, "bounds", "text 5")["cached"] is True
        # A result that is too large is given, and not kept.
        for _ in range(2):
            assert "cached" not in predict(http, "bounds", "long " * 1000)
        assert http.get("/cache").json()["entries"] == 3
        assert http.delete("/cache?model=other").json() == {"cleared": 0}
        assert http.delete("/cache?model=bounds").json() == {"cleared": 3}
        assert cache.size() == (0, 0)


def test_a_result_is_kept_for_its_time(repository, start_worker, serve, client, cache):
    repository.add("brief", deterministic=True, cache={"ttl_s": 0.2})
    with start_worker("brief"), serve() as http:
        known(client, "brief")
        predict(http, "brief", "text")
        wait_until(lambda: not client.keys("inferno:cache:kept:*"))
        assert "cached" not in predict(http, "brief", "text")
        # What has expired is forgotten with the next that is kept.
        predict(http, "brief", "another")
        wait_until(lambda: not client.keys("inferno:cache:kept:*"))
        predict(http, "brief", "third")
        assert cache.size()[0] == 1


def test_a_full_redis_drops_kept_results_before_it_refuses_tasks(
    repository, start_worker, serve, client, cache
):
    repository.add("full", deterministic=True)
    with start_worker("full"), serve() as http:
        known(client, "full")
        texts = [f"{n} " * 50_000 for n in range(8)]
        for text in texts:
            predict(http, "full", text)
        assert cache.size()[0] == 8
        room = cache.size()[1] // 2
        # Only kept results make room: the tasks' own are deleted here.
        client.delete(*client.keys("celery-task-meta-*"))
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        try:
            assert "cached" not in predict(http, "full", "text")
        finally:
            client.config_set("maxmemory", 0)
        assert cache.size()[1] < room


def test_other_clients_may_wait_for_a_task_that_shares(
    repository, start_worker, serve, celery, client
):
    """Celery's own clients take no part, and are answered like any."""
    repository.add("others", **SHARED)
    with start_worker("others"), serve() as http:
        known(client, "others")
        assert send(celery, "others", "text").get(timeout=10)["outputs"]["text"]["data"] == ["text"]
        assert "cached" not in predict(http, "others", "text")
        assert "cached" not in send(celery, "others", "text").get(timeout=10)
    assert repository.ran() == ["text"] * 3


def test_operators_see_and_clear_what_is_kept(repository, start_worker, serve, client):
    repository.add("seen", **SHARED)
    with start_worker("seen"), serve() as http, Client(str(http.base_url)) as platform:
        known(client, "seen")
        for _ in range(3):
            platform.predict("seen", "text")
        found = platform.cache()
        (model,) = found["models"]
        assert model == {
            "model": "seen", "hits": 2, "misses": 1, "coalesced": 0, "deduplicated": 0,
        }  # fmt: skip
        assert (found["entries"], found["max_entries"]) == (1, 10_000)
        assert platform.clear_cache() == 1
        assert "cached" not in platform.predict("seen", "text").raw


def test_it_can_be_switched_off_as_a_whole(repository, start_worker, serve, client):
    repository.add("off", **SHARED)
    with start_worker("off"), serve(INFERNO_CACHE__ENABLED="false") as http:
        known(client, "off")
        for _ in range(2):
            assert "cached" not in predict(http, "off", "text")
    assert not client.keys("inferno:cache:*")
