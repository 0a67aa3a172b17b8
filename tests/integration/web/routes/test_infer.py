"""The ways in: submit and predict."""

from __future__ import annotations

import base64
import json

import pytest

from inferno.errors import DeadlineExceeded, ForwardFailed
from tests.integration.web.conftest import with_gateway

NATIVE = {"model": "sentiment", "inputs": {"text": "Good."}}


def problem(response, status):
    """Return the problem that a response describes, after checking that it is one."""
    assert response.status_code == status, response.data
    assert response.mimetype == "application/problem+json"
    assert response.data.endswith(b"\n")
    body = response.get_json(force=True)
    assert body["status"] == status
    assert body["detail"]
    return body


@pytest.mark.parametrize("prefix", ["", "/v1", "/api/v1"])
def test_submit_answers_202_with_where_to_ask(client, prefix):
    response = client.post(f"{prefix}/infer", json=NATIVE)
    body = response.get_json()
    assert response.status_code == 202
    assert body["status"] == "queued"
    assert (body["model"], body["version"]) == ("sentiment", 2)
    assert body["links"]["self"] == response.headers["Location"] == f"/tasks/{body['task_id']}"
    assert body["links"]["websocket"] == f"/ws/{body['task_id']}"
    assert response.headers["Retry-After"] == "1"
    assert response.data.endswith(b"\n")
    assert "job_id" not in body


def test_submit_needs_no_content_type(client):
    assert client.post("/infer", data=json.dumps(NATIVE)).status_code == 202


def test_submit_is_in_the_lane_when_it_is_answered(client, store):
    before = set(store.scan_iter())
    client.post("/infer", json=NATIVE)
    assert len(set(store.scan_iter()) - before) >= 2


def test_platform_form_is_answered_in_its_own_names(client):
    form = {"model_name": "sentiment", "input_type": "text", "payload": "Good.", "priority": 5}
    body = client.post("/api/v1/infer", json=form).get_json()
    assert body["job_id"] == body["task_id"]
    assert body["model_name"] == "sentiment"
    assert body["enqueued_at"] == body["accepted_at"]
    assert body["result_ws"] == f"/api/v1/ws/{body['task_id']}"


def test_short_form_is_answered_in_its_own_names(client):
    body = client.post("/infer", json={"model_id": "sentiment", "input": "Good."}).get_json()
    assert body["request_id"] == body["task_id"]
    assert "job_id" not in body


def test_image_is_accepted_as_base64_and_as_data_uri(client, png):
    for payload in (png, f"data:image/png;base64,{png}"):
        form = {"model_name": "digits", "input_type": "image", "payload": payload}
        assert client.post("/infer", json=form).status_code == 202


def test_image_is_accepted_as_a_binary_body(client, png, records):
    raw = base64.b64decode(png)
    for path, kind in (
        ("/infer?model=digits", "image/png"),
        ("/infer?model=digits&input=image&priority=3", "application/octet-stream"),
    ):
        answer = client.post(path, data=raw, content_type=kind)
        assert (answer.status_code, answer.json["model"]) == (202, "digits")
        record, _ = records.fetch(answer.json["task_id"])
        assert record.priority == (3 if "priority" in path else 0)


def test_predict_takes_a_binary_body(client, answering, png):
    raw = base64.b64decode(png)
    answer = client.post("/v1/models/digits:predict", data=raw, content_type="image/png")
    assert (answer.status_code, "outputs" in answer.json) == (200, True)
    for query, data, field in (
        ("?typo=1", raw, "typo"),
        ("?model=digits", raw, "model"),
        ("", b"no image", "inputs.image"),
        ("", b"", "inputs.image"),
    ):
        answer = client.post(f"/v1/models/digits:predict{query}", data=data, content_type="image/x")
        assert answer.status_code in (400, 422)
        assert answer.json["field"] == field


def test_parameters_of_a_json_body_are_not_ignored(client):
    for path, name in (("/infer?model=sentiment", "model"), ("/infer?priority=9", "priority")):
        body = problem(client.post(path, json=NATIVE), 422)
        assert (body["code"], body["field"]) == ("invalid_field", name)
    inputs = {"inputs": NATIVE["inputs"]}
    answer = client.post("/v1/models/sentiment:predict?codec=base64", json=inputs)
    assert problem(answer, 422)["field"] == "codec"
    assert client.post("/infer?trace=1", json=NATIVE).status_code == 202


def test_query_is_a_part_of_what_a_key_stands_for(client, png):
    def submit(query):
        return client.post(
            f"/infer?model=digits{query}",
            data=base64.b64decode(png),
            content_type="image/png",
            headers={"Idempotency-Key": "binary"},
        )

    assert submit("").json == submit("").json
    assert submit("&version=1").json["code"] == "idempotency_key_reused"


def test_version_in_the_body_selects_it(client):
    body = client.post("/infer", json=NATIVE | {"version": 1}).get_json()
    assert body["version"] == 1


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"null", 400, None),
        (b'"text"', 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"model": "sentiment", "inputs": {"text": NaN}}', 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"model": "sentiment", "inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, None),
        (b'{"model": "sentiment"}', 422, "inputs"),
        (b'{"inputs": {"text": "a"}}', 422, "model"),
        (b'{"model": 7, "inputs": {"text": "a"}}', 422, "model"),
        (b'{"model": "sentiment", "inputs": {"text": "a"}, "extra": 1}', 422, "extra"),
        (b'{"model": "sentiment", "model_id": "x", "inputs": {"text": "a"}}', 422, "model_id"),
    ],
)
def test_what_is_no_request_is_refused(client, body, status, field):
    assert problem(client.post("/infer", data=body), status).get("field") == field


@pytest.mark.parametrize(
    ("change", "status", "code", "field"),
    [
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"model": "../etc"}, 404, "model_not_found", "model"),
        ({"version": 9}, 404, "model_not_found", "version"),
        ({"version": "one"}, 422, "invalid_field", "version"),
        ({"priority": 10}, 422, "invalid_field", "priority"),
        ({"priority": -1}, 422, "invalid_field", "priority"),
        ({"priority": 1.5}, 422, "invalid_field", "priority"),
        ({"timeout_ms": 0}, 422, "invalid_field", "timeout_ms"),
        ({"timeout_ms": -5}, 422, "invalid_field", "timeout_ms"),
        ({"timeout_ms": 1e12}, 422, "invalid_field", "timeout_ms"),
        ({"codec": "xml"}, 422, "invalid_field", "codec"),
        ({"outputs": ["nothing"]}, 422, "invalid_input", "outputs"),
        ({"outputs": []}, 422, "invalid_input", "outputs"),
        ({"inputs": {}}, 422, "invalid_input", "inputs"),
        ({"inputs": {"wrong": "a"}}, 422, "invalid_input", "inputs"),
        ({"inputs": {"text": ""}}, 422, "invalid_input", "inputs.text"),
        ({"inputs": {"text": ["a", ""]}}, 422, "invalid_input", "inputs.text"),
        ({"inputs": {"text": []}}, 422, "invalid_input", "inputs.text"),
        ({"inputs": {"text": 7}}, 422, "invalid_input", "inputs.text"),
        ({"inputs": {"text": None}}, 422, "invalid_input", "inputs.text"),
        ({"inputs": {"text": "x" * 10_000_000}}, 422, "invalid_input", "inputs.text"),
        ({"inputs": {"text": ["x"] * 2000}}, 422, "invalid_input", "inputs.text"),
        ({"inputs": 7}, 422, "invalid_input", "inputs"),
        ({"webhook": "a.example"}, 422, "invalid_field", "webhook"),
        ({"webhook": "http://169.254.169.254/latest"}, 422, "invalid_field", "webhook"),
        ({"webhook": "http://localhost"}, 422, "invalid_field", "webhook"),
        ({"webhook_events": ["start"]}, 422, "invalid_field", "webhook_events"),
    ],
)
def test_wrong_values_are_refused_with_the_field(client, store, change, status, code, field):
    store.flushall()
    body = problem(client.post("/infer", json=NATIVE | change), status)
    assert (body["code"], body.get("field")) == (code, field)
    assert store.dbsize() == 0, "a refused request leaves nothing behind"


def test_a_webhook_may_be_private_where_the_settings_say_so(client, app):
    body = {"inputs": {"text": "a"}, "webhook": "http://[::1]"}
    refused = problem(client.post("/v1/models/sentiment:predict", json=body), 422)
    assert refused["field"] == "webhook"
    here = app.extensions["inferno"]
    webhooks = here.settings.webhooks.model_copy(update={"allow_private": True})
    settings = here.settings.model_copy(update={"webhooks": webhooks})
    with_gateway(app, settings=settings)
    assert client.post("/infer", json=body | {"model": "sentiment"}).status_code == 202


def test_lists_nested_to_any_depth_are_refused(client):
    for depth in (3, 40, 70, 500):
        value = "[" * depth + '"a"' + "]" * depth
        body = f'{{"model": "sentiment", "inputs": {{"text": {value}}}}}'
        assert client.post("/infer", data=body).status_code in (400, 422)
        value = value.replace('"a"', "1")
        body = f'{{"model": "tokens", "inputs": {{"tokens": {value}, "mask": [1]}}}}'
        assert client.post("/infer", data=body).status_code in (400, 422)


@pytest.mark.parametrize(
    "image",
    [
        "",
        "AAAA",
        "not base64!",
        "iVBORw0KGgoAAAANSUhEUg",
        "R0lGODlhAQABAIAAAAAAAP",
        "data:image/png,x",
    ],
)
def test_what_is_no_image_is_refused(client, image):
    form = {"model": "digits", "inputs": {"image": image}}
    response = client.post("/infer", json=form)
    if image != "R0lGODlhAQABAIAAAAAAAP":
        assert problem(response, 422)["field"] == "inputs.image"


def test_body_over_the_limit_is_refused(client, settings):
    body = problem(client.post("/infer", data=b"x" * (settings.limits.max_body_bytes + 1)), 413)
    assert body["code"] == "payload_too_large"
    assert str(settings.limits.max_body_bytes) in body["detail"]


def test_rows_over_the_batch_are_refused_where_the_model_says_so(client):
    rows = {"tokens": [[1, 2]] * 5, "mask": [[1, 1]] * 5}
    problem(client.post("/infer", json={"model": "tokens", "inputs": rows}), 422)


def test_submit_is_accepted_while_no_worker_serves_the_model(client, worker):
    worker.cluster.leave("fake@host")
    assert client.post("/infer", json=NATIVE).status_code == 202


def test_submit_waits_as_long_as_the_client_prefers(client, answering):
    response = client.post("/infer", json=NATIVE, headers={"Prefer": "respond-async, wait=20"})
    body = response.get_json()
    assert response.status_code == 200
    assert response.headers["Preference-Applied"] == "wait=20"
    assert body["status"] == "succeeded"
    assert body["outputs"]["text"]["data"] == [body["task_id"]]
    assert body["accepted_at"] <= body["finished_at"]


def test_submit_answers_202_when_the_client_s_patience_ends(client):
    response = client.post("/infer", json=NATIVE, headers={"Prefer": "wait=1"})
    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "wait=1"
    assert response.headers["Location"]


@pytest.mark.parametrize("prefer", ["wait=soon", "wait=-1", "", "handling=lenient"])
def test_preferences_that_are_not_understood_are_ignored(client, prefer):
    response = client.post("/infer", json=NATIVE, headers={"Prefer": prefer})
    assert response.status_code == 202
    assert "Preference-Applied" not in response.headers


@pytest.mark.parametrize("path", ["sentiment:predict", "sentiment%3Apredict"])
def test_predict_answers_with_outputs(client, answering, path):
    tensor = {"dtype": "string", "shape": [1], "data": ["Good."]}
    response = client.post(f"/v1/models/{path}", data=json.dumps({"inputs": {"text": tensor}}))
    body = response.get_json()
    assert response.status_code == 200
    assert body["outputs"]["text"]["data"] == [body["task_id"]]
    assert (body["model"], body["version"]) == ("sentiment", 2)
    assert body["batch"]["flush_reason"] == "idle"
    assert body["timings"]["total_ms"] == 6
    assert "Preference-Applied" not in response.headers


def test_predict_takes_base64_tensors(client, answering):
    tokens = base64.b64encode(bytes(16)).decode()
    body = {
        "inputs": {
            "tokens": {"dtype": "int64", "shape": [1, 2], "base64": tokens},
            "mask": {"dtype": "float32", "shape": [1, 2], "data": [1.0, 1.0]},
        }
    }
    assert client.post("/v1/models/tokens:predict", json=body).status_code == 200


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"mask": [1]}, "Missing required input(s): tokens. Expected inputs: mask, tokens"),
        ({"tokens": [1], "mask": [1], "x": 1}, "Unexpected input(s): x"),
        ({"tokens": {"dtype": "float32", "data": [[1]]}, "mask": [1]}, "float32"),
        ({"tokens": {"dtype": "int9", "data": [[1]]}, "mask": [1]}, "unsupported dtype"),
        ({"tokens": {"data": [1], "base64": ""}, "mask": [1]}, "data or base64"),
        ({"tokens": {"shape": [1]}, "mask": [1]}, "data or base64"),
        ({"tokens": {"shape": [1, 2], "base64": "AAA"}, "mask": [1]}, "malformed base64"),
        ({"tokens": {"shape": [1, 2], "base64": "AAAA"}, "mask": [1]}, "16 bytes"),
        ({"tokens": {"shape": [3, 2], "data": [1]}, "mask": [1]}, "6 elements"),
        ({"tokens": [1.5], "mask": [1]}, "int64"),
        ({"tokens": [[1], [1, 2]], "mask": [1]}, "ragged"),
        ({"tokens": [1, 2], "mask": [1]}, "n is 2, but 1 in mask"),
        ({"tokens": [2**70], "mask": [1]}, "int64"),
        ({"tokens": [1], "mask": [1e300]}, "finite"),
    ],
)
def test_predict_explains_what_is_wrong_with_422(client, inputs, text):
    body = problem(client.post("/v1/models/tokens:predict", json={"inputs": inputs}), 422)
    assert text in body["detail"]


def test_predict_of_an_unknown_model_is_404(client):
    body = problem(client.post("/v1/models/nobody:predict", json={"inputs": {"a": 1}}), 404)
    assert "model not found or not loaded" in body["detail"]


def test_predict_without_a_worker_is_503_and_queues_nothing(client, worker, store):
    store.flushall()
    response = client.post("/v1/models/sentiment:predict", json={"inputs": {"text": "Good."}})
    body = problem(response, 503)
    assert "inferno worker sentiment" in body["detail"]
    assert response.headers["Retry-After"]
    assert store.dbsize() == 0


def test_predict_is_taken_as_soon_as_a_worker_is_ready(client, worker, store):
    store.flushall()

    def ask():
        body = {"inputs": {"text": "Good."}}
        headers = {"Prefer": "respond-async"}
        return client.post("/v1/models/sentiment:predict", json=body, headers=headers)

    problem(ask(), 503)
    worker.serve(sentiment=[2])
    assert ask().status_code == 202


@pytest.mark.parametrize(
    ("error", "status"),
    [(DeadlineExceeded("too late"), 504), (ForwardFailed("it broke", "inputs.text"), 500)],
)
def test_failed_task_answers_with_its_own_status(client, answering, error, status):
    answering.outcome = lambda task: error
    body = problem(
        client.post("/v1/models/sentiment:predict", json={"inputs": {"text": "Good."}}), status
    )
    assert body["detail"] == error.detail
    assert body["task_id"]


def test_predict_whose_deadline_passes_in_the_lane_is_504(client, worker):
    body = {"inputs": {"text": "Late."}, "timeout_ms": 50}
    answer = client.post("/v1/models/sentiment:predict", json=body)
    assert answer.status_code == 504
    assert answer.json["code"] == "deadline_exceeded"
    assert answer.json["field"] == "timeout_ms"
    shown = client.get(f"/tasks/{answer.json['task_id']}").json
    assert shown["status"] == "expired"


def test_submit_that_waits_hears_of_its_deadline(client):
    body = NATIVE | {"timeout_ms": 50}
    answer = client.post("/infer", json=body, headers={"Prefer": "wait=20"})
    assert (answer.status_code, answer.json["status"]) == (200, "expired")


def test_impatient_predict_leaves_with_the_task(client, worker):
    response = client.post(
        "/v1/models/sentiment:predict",
        json={"inputs": {"text": "Good."}},
        headers={"Prefer": "respond-async"},
    )
    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "respond-async"
    task_id = response.get_json()["task_id"]
    worker.succeed(task_id)
    assert client.get(response.headers["Location"]).get_json()["status"] == "succeeded"


def test_a_dead_broker_is_503_and_said_so(client, app, monkeypatch, redis_url):
    def closed(*_, **__):
        raise ConnectionRefusedError

    services = app.extensions["inferno"]
    services.client.connection_pool.disconnect()
    monkeypatch.setattr("redis.connection.Connection._connect", closed)
    response = client.get("/tasks/some-id")
    assert problem(response, 503)["code"] == "broker_unavailable"
    assert response.headers["Retry-After"]
    monkeypatch.undo()
    assert client.get("/tasks/some-id").status_code == 404


def test_routes_and_methods_that_do_not_exist_are_problems(client):
    assert problem(client.get("/nowhere"), 404)["code"] == "not_found"
    response = client.get("/infer")
    assert problem(response, 405)["code"] == "method_not_allowed"
    assert "POST" in response.headers["Allow"]


def test_unexpected_errors_tell_nothing_about_the_inside(app, client, monkeypatch, caplog):
    services = app.extensions["inferno"]
    monkeypatch.setattr(type(services.records), "fetch", lambda *_: 1 / 0)
    body = problem(client.get("/tasks/some-id"), 500)
    assert "division" not in str(body)
    assert "ZeroDivisionError" in caplog.text
