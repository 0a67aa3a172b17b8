"""The client, against a scripted platform: a real server that answers what each test needs."""

import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from flask import Flask, abort, request
from flask_sock import Sock
from simple_websocket import Server  # type: ignore[import-untyped]
from werkzeug.serving import make_server

from inferno import errors
from inferno.client import Client, Request, rebuild
from inferno.client.stream import STREAM_WINDOW
from inferno.errors import (
    ForwardFailed,
    InfernoError,
    InvalidInput,
    InvalidRequest,
    ModelNotFound,
    PlatformUnreachable,
    ServingError,
)
from inferno.protocol.tasks import TaskState

SIGNATURE = {
    "inputs": [
        {"name": "text", "dtype": "string", "shape": ["batch"], "optional": True},
        {"name": "x", "dtype": "float32", "shape": ["batch", "n"], "optional": True},
        {"name": "image", "dtype": "bytes", "shape": ["batch"], "optional": True},
    ],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
}


class ScriptedPlatform:
    """Answers like the platform; a task's inputs tell how it ends."""

    def __init__(self) -> None:
        #: The bodies of submits and predicts, as they came.
        self.bodies: list[dict] = []
        #: The idempotency keys of submits and predicts.
        self.keys: list[str | None] = []
        #: Tasks that a predict leaves unfinished, and how often they are asked for before they end.
        self.patience = 0
        self.asked = 0
        self.most_under_way = 0
        #: What else it answers, by method and path; and what was asked of that, with its query.
        self.answers: dict[str, dict | InfernoError] = {}
        self.calls: list[str] = []
        #: The bodies of these.
        self.scripts: list[dict | None] = []
        #: What each worker has of every model.
        self.workers: list[dict] = []
        app = Flask(__name__)
        app.post("/infer")(self.infer)
        app.post("/v1/models/<model>:predict")(self.predict)
        app.get("/tasks/<task_id>")(self.task)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/<name>")(self.model)
        app.get("/health")(self.health)
        app.route("/<path:path>", methods=["GET", "POST", "PUT", "DELETE"])(self.scripted)
        app.delete("/tasks/<path>")(self.scripted)
        Sock(app).route("/ws")(self.socket)
        self.server = make_server("127.0.0.1", 0, app, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def infer(self):
        body = request.get_json()
        if body["model"] == "nope":
            return ModelNotFound("no such model", "model").problem(), 404
        self.bodies.append(body)
        self.keys.append(request.headers.get("Idempotency-Key"))
        return {"task_id": f"task-{len(self.bodies) - 1}", "status": "queued"}, 202

    def predict(self, model):
        self.bodies.append(request.get_json())
        self.keys.append(request.headers.get("Idempotency-Key"))
        if self.patience:
            return {"task_id": "task-0", "status": "queued"}, 202
        return self.view("task-0")

    def task(self, task_id):
        self.asked += 1
        if self.asked <= self.patience:
            return {"task_id": task_id, "model": "echo", "status": "running"}
        return self.view(task_id)

    def view(self, task_id):
        """The document of a finished task; a text with "poison" fails it."""
        body = self.bodies[int(task_id.removeprefix("task-"))]
        head = {"task_id": task_id, "model": "echo", "version": 1}
        if "poison" in json.dumps(body):
            return head | {"status": "failed", "error": ForwardFailed("poisoned").problem()}
        outputs = {
            "y": {"dtype": "float32", "shape": [2], "data": [0.5, 1.5]},
            "z": {"dtype": "float64", "shape": [1], "base64": "AAAAAAAA8D8="},
            "label": {"dtype": "string", "shape": [1], "data": ["good"]},
            "thumb": {"dtype": "bytes", "shape": [1], "data": ["aGk="]},
        }
        return head | {"status": "succeeded", "outputs": outputs}

    def scripted(self, path):
        asked = f"{request.method} {request.full_path.rstrip('?')}"
        answer = self.answers.get(asked)
        if answer is None:
            abort(404)
        self.calls.append(asked)
        self.scripts.append(request.get_json(silent=True))
        if isinstance(answer, InfernoError):
            return answer.problem(), answer.status
        return answer

    def health(self):
        return {"status": "degraded"}, 503

    def models(self):
        return {"models": [{"name": "echo", "ready": True}]}

    def model(self, name):
        if name == "nope":
            return ModelNotFound("no such model", "model").problem(), 404
        count = {"name": "n", "dtype": "int8", "shape": ["batch"]}
        signature = SIGNATURE | {"inputs": [count]} if name == "counts" else SIGNATURE
        return {"name": name, "signature": signature, "workers": self.workers}

    def socket(self, ws: Server) -> None:
        """Answers in pairs, the later one first; all that wait when nothing more comes."""
        waiting: list[str] = []
        while True:
            message = ws.receive(timeout=0.2 if waiting else None)
            if message is not None:
                task_id = self.said(ws, json.loads(message))
                if task_id is not None:
                    waiting.append(task_id)
                    self.most_under_way = max(self.most_under_way, len(waiting))
            if message is None or len(waiting) == 1000:
                while waiting:
                    view = self.view(waiting.pop())
                    kind = "result" if view["status"] == "succeeded" else "error"
                    answer = {"type": kind, "task_id": view["task_id"], "data": view}
                    ws.send(json.dumps(answer))

    def said(self, ws: Server, message: dict) -> str | None:
        if message["type"] == "subscribe":
            [task_id] = message["task_ids"]
            if task_id != "unknown":
                return task_id
            problem = errors.TaskNotFound("no such task").problem()
            ws.send(json.dumps({"type": "error", "task_id": task_id, "data": problem}))
            return None
        if message["model"] == "nope":
            problem = ModelNotFound("no such model").problem()
            ws.send(json.dumps({"type": "error", "id": message["id"], "data": problem}))
            return None
        if message["model"] == "close":
            ws.close(1001, "stopping")
        self.bodies.append(message)
        task_id = f"task-{len(self.bodies) - 1}"
        accepted = {"type": "accepted", "id": message["id"], "data": {"task_id": task_id}}
        ws.send(json.dumps(accepted))
        return task_id


@pytest.fixture
def platform() -> Iterator[ScriptedPlatform]:
    platform = ScriptedPlatform()
    thread = threading.Thread(target=platform.server.serve_forever, args=(0.01,))
    thread.start()
    yield platform
    platform.server.shutdown()
    thread.join()
    platform.server.server_close()


@pytest.fixture
def client(platform: ScriptedPlatform) -> Iterator[Client]:
    with Client(platform.url) as client:
        yield client


@pytest.mark.parametrize(
    ("inputs", "wire"),
    [
        ({"text": "hello"}, {"text": "hello"}),
        ({"text": ["a", "b"]}, {"text": ["a", "b"]}),
        ({"x": [[1, 2.5]]}, {"x": [[1, 2.5]]}),
        (
            {"x": np.array([[1, 2]], np.float32)},
            {"x": {"dtype": "float32", "shape": [1, 2], "base64": "AACAPwAAAEA="}},
        ),
        # Big-endian and with gaps, as other programs leave it.
        (
            {"x": np.array([[1, 0, 2, 0]], ">f4")[:, ::2]},
            {"x": {"dtype": "float32", "shape": [1, 2], "base64": "AACAPwAAAEA="}},
        ),
        # In numpy's own dtypes.
        (
            {"x": np.array([[1.0, 2.0]])},
            {"x": {"dtype": "float32", "shape": [1, 2], "base64": "AACAPwAAAEA="}},
        ),
        (
            {"x": np.array([1, 2])},
            {"x": {"dtype": "float32", "shape": [1, 2], "base64": "AACAPwAAAEA="}},
        ),
        ({"image": b"hi"}, {"image": "aGk="}),
        ({"image": [b"hi", b"ho"]}, {"image": ["aGk=", "aG8="]}),
        ({"text": np.array(["a", "b"])}, {"text": ["a", "b"]}),
        ({"x": [np.float32(1), np.int64(2)]}, {"x": [1.0, 2]}),
        ({"x": {"dtype": "float32", "shape": [1], "data": [1]}},) * 2,
        ("hello", "hello"),
        (
            np.array([[1.0, 2.0]]),
            {"x": {"dtype": "float32", "shape": [1, 2], "base64": "AACAPwAAAEA="}},
        ),
    ],
)
def test_inputs_are_written_for_the_wire(client, platform, inputs, wire) -> None:
    client.submit("echo", inputs)

    assert platform.bodies == [{"model": "echo", "inputs": wire}]


@pytest.mark.parametrize(
    ("inputs", "wire"),
    [
        ({"n": np.array([3])}, {"n": {"dtype": "int8", "shape": [1], "base64": "Aw=="}}),
        ({"n": np.array([300])}, {"n": {"dtype": "int64", "shape": [1], "base64": "LAEAAAAAAAA="}}),
        (
            {"n": np.array([0.5])},
            {"n": {"dtype": "float64", "shape": [1], "base64": "AAAAAAAA4D8="}},
        ),
        ({"?": np.array([True])}, {"?": {"dtype": "bool", "shape": [1], "base64": "AQ=="}}),
    ],
)
def test_what_does_not_fit_is_left_for_the_platform_to_refuse(
    client, platform, inputs, wire
) -> None:
    client.submit("counts", inputs)

    assert platform.bodies == [{"model": "counts", "inputs": wire}]


def test_bytes_alone_are_an_image(client, platform) -> None:
    client.submit("echo", b"hi")

    assert platform.bodies == [{"model": "echo", "inputs": "aGk=", "input_type": "image"}]


def test_options_are_sent_when_they_are_given(client, platform) -> None:
    options = {"version": 2, "outputs": ["y"], "priority": 9, "timeout_ms": 50}
    options |= {"webhook": "http://a.example/", "webhook_events": ["start"]}
    client.submit("echo", "a", **options)

    assert platform.bodies == [{"model": "echo", "inputs": "a"} | options]


def test_idempotency_keys_are_sent_with_each_kind_of_call(client, platform) -> None:
    client.submit("echo", {"text": "hi"}, idempotency_key='a "b" \\')
    client.predict("echo", {"text": "hi"}, idempotency_key="c")
    client.submit("echo", {"text": "hi"})
    assert platform.keys == ['"a \\"b\\" \\\\"', '"c"', None]
    assert all("idempotency_key" not in body for body in platform.bodies)
    list(client.stream([Request("echo", {"text": "hi"}, idempotency_key="d")]))
    assert platform.bodies[-1]["idempotency_key"] == "d"
    with pytest.raises(InvalidRequest):
        client.submit("echo", {"text": "hi"}, idempotency_key="é")


def test_result_has_arrays_of_the_declared_dtypes(client) -> None:
    result = client.submit("echo", "a").result()

    assert result.status is TaskState.SUCCEEDED
    assert (result.model, result.version, result.error) == ("echo", 1, None)
    assert result.outputs["y"].dtype == np.float32
    assert result.outputs["y"].tolist() == [0.5, 1.5]
    assert result.outputs["z"].tolist() == [1.0]
    assert result.outputs["label"].tolist() == ["good"]
    assert result.outputs["thumb"].tolist() == [b"hi"]


def test_failed_task_raises_the_error_it_ended_with(client) -> None:
    task = client.submit("echo", "poison")

    assert task.status() is TaskState.FAILED
    with pytest.raises(ForwardFailed, match="poisoned"):
        task.result()


def test_waiting_ends_when_patience_does_and_the_task_goes_on(client, platform) -> None:
    platform.patience = 10**6
    task = client.submit("echo", "a")

    with pytest.raises(TimeoutError, match=r"task-0 is running after 0\.2 s"):
        task.result(timeout_s=0.2)
    platform.patience = 0
    assert task.result().status is TaskState.SUCCEEDED


def test_refused_request_raises_the_error_of_the_platform(client) -> None:
    with pytest.raises(ModelNotFound, match="no such model") as caught:
        client.submit("nope", "a")

    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("inputs", "wire"),
    [
        ("hello", {"text": "hello"}),
        (b"hi", {"image": "aGk="}),
        ({"x": [1]}, {"x": [1]}),
    ],
)
def test_predict_names_the_inputs(client, platform, inputs, wire) -> None:
    if inputs == "hello":
        # Text could be an image in base64 too.
        with pytest.raises(InvalidInput, match="more than one input"):
            client.predict("echo", inputs)
        inputs = {"text": inputs}

    result = client.predict("echo", inputs)

    assert platform.bodies == [{"inputs": wire}]
    assert result.outputs["label"].tolist() == ["good"]


def test_predict_waits_on_where_the_platform_stops_waiting(client, platform) -> None:
    platform.patience = 2

    assert client.predict("echo", {"text": "a"}).status is TaskState.SUCCEEDED
    assert platform.asked == 3


def test_stream_yields_every_result_with_its_request(client, platform) -> None:
    requests = [Request("echo", {"text": f"text {n}"}) for n in range(STREAM_WINDOW + 20)]

    results = list(client.stream(iter(requests)))

    assert {result.request.inputs["text"] for result in results} == {
        request.inputs["text"] for request in requests
    }
    assert all(result.error is None for result in results)
    assert platform.most_under_way <= STREAM_WINDOW


def test_failures_do_not_end_a_stream(client) -> None:
    task = client.submit("echo", "a")
    items = [Request("echo", "poison"), Request("nope", "a"), task, "unknown", Request("echo", "b")]

    results = list(client.stream(items))

    kinds = {(r.request.inputs if r.request else r.task_id): type(r.error) for r in results}
    assert kinds == {
        "poison": ForwardFailed,
        "a": ModelNotFound,
        "task-0": type(None),
        "unknown": errors.TaskNotFound,
        "b": type(None),
    }
    with pytest.raises(ForwardFailed):
        next(r for r in results if r.request == items[0]).checked()


def test_a_stream_answers_for_the_same_task_as_often_as_it_is_asked(client) -> None:
    task = client.submit("echo", "a")
    first = client.stream([task, task.id])
    assert [result.task_id for result in first] == [task.id, task.id]

    def one_after_the_other():
        yield task
        yield task

    stream = client.stream(one_after_the_other())
    assert [next(stream).task_id, next(stream).task_id] == [task.id, task.id]


def test_stream_of_nothing_is_empty(client) -> None:
    assert list(client.stream([])) == []


def test_connection_that_the_platform_closes_is_one_clear_error(client) -> None:
    with pytest.raises(ServingError, match="closed the connection: stopping"):
        list(client.stream([Request("close", "a")]))


def test_task_is_cancelled_and_retried(client, platform) -> None:
    platform.answers = {
        "DELETE /tasks/task-0": {"task_id": "task-0", "status": "cancelled"},
        "DELETE /tasks/over": errors.WrongState("the task is succeeded"),
        "POST /tasks/task-0/retry": {"task_id": "task-1"},
        "POST /tasks/lost/retry": errors.PayloadGone("it was deleted"),
    }
    client.submit("echo", "a").cancel()

    assert client.cancel("task-0")["status"] == "cancelled"
    assert client.retry("task-0").id == "task-1"
    with pytest.raises(errors.WrongState):
        client.cancel("over")
    with pytest.raises(errors.PayloadGone):
        client.retry("lost")


def test_lists_are_read_page_by_page(client, platform) -> None:
    first, second = [{"task_id": "c"}, {"task_id": "b"}], [{"task_id": "a"}]
    chosen = "limit=100&status=queued%2Crunning&model=echo"
    platform.answers = {
        f"GET /tasks?{chosen}": {"tasks": first, "next": "x="},
        f"GET /tasks?{chosen}&cursor=x%3D": {"tasks": second, "next": None},
        "GET /dead?limit=100": {"dead": first, "next": "y"},
        "GET /dead?limit=100&cursor=y": {"dead": second, "next": None},
    }

    found = list(client.tasks(status=["queued", "running"], model="echo"))

    assert found == first + second == list(client.dead_letters())


def test_dead_letters_are_replayed_and_discarded(client, platform) -> None:
    letter = {"task_id": "task-0", "traceback": "...", "payload": {}}
    answer = {"replayed": 1, "left": 0, "tasks": [{"task_id": "n", "replay_of": "o"}]}
    platform.answers = {
        "GET /dead/task-0": letter,
        "GET /dead?limit=1": {"dead": [letter], "count": 3, "next": None},
        "POST /dead/task-0/replay": {"task_id": "task-1"},
        "POST /dead/replay": answer,
        "POST /dead/replay?model=echo": answer,
        "DELETE /dead/task-0": {"discarded": 1},
        "DELETE /dead?confirm=2": {"discarded": 2},
        "DELETE /dead?confirm=1": errors.NotConfirmed("2 would be discarded"),
    }

    assert client.dead_letter("task-0") == letter
    assert client.count_dead_letters() == 3
    assert client.replay("task-0").id == "task-1"
    assert client.replay_all() == client.replay_all(model="echo") == answer
    client.discard("task-0")
    client.discard_all(2)
    with pytest.raises(errors.NotConfirmed):
        client.discard_all(1)
    assert platform.calls == list(platform.answers)


def test_lanes_are_paused_resumed_and_purged(client, platform) -> None:
    lane = {"model": "echo", "waiting": 2, "held": 0, "delayed": 1, "paused": False}
    platform.answers = {
        "GET /lanes": {"lanes": [lane]},
        "GET /lanes/echo": lane,
        "POST /lanes/echo/pause": lane,
        "POST /lanes/echo/resume": lane,
        "POST /lanes/echo/purge?confirm=3": {"model": "echo", "cancelled": 3},
    }

    assert client.lanes() == [client.lane("echo")] == [lane]
    client.pause("echo")
    client.resume("echo")
    assert client.purge("echo", 3) == 3
    assert platform.calls == list(platform.answers)


def test_models_and_health_are_told_as_they_are(client) -> None:
    assert client.models() == [{"name": "echo", "ready": True}]
    assert client.model("echo")["signature"] == SIGNATURE
    assert client.health() == {"status": "degraded"}
    with pytest.raises(ModelNotFound):
        client.model("nope")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid"])
@pytest.mark.parametrize("call", [Client.models, lambda client: list(client.stream(["a"]))])
def test_nothing_at_the_address_is_one_clear_error(call, url) -> None:
    with (
        Client(url) as client,
        pytest.raises(PlatformUnreachable, match="is the platform running"),
    ):
        call(client)


def test_another_kind_of_server_is_told_apart(platform, client) -> None:
    client = Client(f"{platform.url}/elsewhere")

    with (
        client,
        pytest.raises(ServingError, match="status 404 and without JSON; it is not an Inferno"),
    ):
        client.models()


def _leaves(kind: type[InfernoError]) -> Iterator[type[InfernoError]]:
    if "code" in vars(kind):
        yield kind
    for child in kind.__subclasses__():
        yield from _leaves(child)


@pytest.mark.parametrize("kind", list(_leaves(InfernoError)))
def test_errors_survive_the_way_through_http(kind: type[InfernoError]) -> None:
    error = kind("what happened", "where")

    again = rebuild(json.loads(json.dumps(error.problem())), error.status)

    assert type(again) is kind or kind is InfernoError
    assert (again.detail, again.field) == ("what happened", "where")


def test_unknown_errors_are_told_apart_by_their_status() -> None:
    assert type(rebuild({"code": "teapot", "detail": "short"}, 418)) is errors.RequestError
    assert type(rebuild({"code": "new", "title": "New"}, 502)) is ServingError
    assert str(rebuild(None, 502)) == "status 502 without an explanation"
