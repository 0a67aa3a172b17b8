"""The Open Inference Protocol as Triton's own client speaks it: `tritonclient.http`."""

from __future__ import annotations

import gzip
import http.client
import json
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import gevent
import httpx
import ml_dtypes
import numpy as np
import pytest
from tritonclient.http import (
    InferenceServerClient,
    InferenceServerException,
    InferInput,
    InferRequestedOutput,
)

from inferno.protocol.oip import EXTENSIONS

A = np.array([[1, 2, 3]], np.float32)
B = np.array([[10, 20, 30]], np.float32)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(address, concurrency=64) as client:
        yield client


def tensor(name: str, array: Any, datatype: str, *, binary: bool = True) -> InferInput:
    given = InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def addends(*, binary: bool = True) -> list[InferInput]:
    return [tensor("a", A, "FP32", binary=binary), tensor("b", B, "FP32", binary=binary)]


def output(name: str, **options: Any) -> InferRequestedOutput:
    return InferRequestedOutput(name, **options)


def test_the_server_is_live_ready_and_describes_itself(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "inferno"
    assert client.get_server_metadata()["extensions"] == EXTENSIONS


def test_models_are_ready_and_described(client: InferenceServerClient) -> None:
    assert client.is_model_ready("add")
    assert client.is_model_ready("add", "1")
    assert not client.is_model_ready("add", "3")
    assert not client.is_model_ready("nobody")
    assert client.get_model_metadata("add") == {
        "name": "add",
        "versions": ["1", "2"],
        "platform": "python",
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "b", "datatype": "FP32", "shape": [-1, -1]},
        ],
        "outputs": [
            {"name": "sum", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "total", "datatype": "FP64", "shape": [-1]},
        ],
    }
    assert client.get_model_metadata("add", "1")["versions"] == ["1"]
    config = client.get_model_config("add")
    assert config["max_batch_size"] == 16
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 5000
    assert config["input"][0] == {"name": "a", "data_type": "TYPE_FP32", "dims": [-1]}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_tensors_go_in_and_out_in_binary_and_in_json(client, binary_in, binary_out):
    asked = None
    if binary_out is not None:
        asked = [output("total", binary_data=binary_out), output("sum", binary_data=True)]
    result = client.infer("add", addends(binary=binary_in), outputs=asked, request_id="r-1")
    np.testing.assert_array_equal(result.as_numpy("sum"), A + B)
    np.testing.assert_array_equal(result.as_numpy("total"), [66.0])
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("r-1", "add", "2")
    in_json = {entry["name"] for entry in answer["outputs"] if "data" in entry}
    assert in_json == ({"total"} if binary_out is False else set())


def test_only_the_outputs_that_are_asked_for_come(client):
    result = client.infer("add", addends(), outputs=[output("total")])
    assert [entry["name"] for entry in result.get_response()["outputs"]] == ["total"]
    assert result.as_numpy("sum") is None


def test_every_kind_of_element_survives(client):
    text = np.array(["grüß dich", "", "日本"], object)
    text[1] = "x" * 300
    blob = np.array([b"\x00\xff", b"abc", b"\n"], object)
    half = np.array([[1, 2], [3, 4], [5, 6]], np.float16)
    flag = np.array([True, False, True])
    result = client.infer(
        "types",
        [
            tensor("text", text, "BYTES"),
            tensor("blob", blob, "BYTES"),
            tensor("half", half, "FP16"),
            tensor("flag", flag, "BOOL"),
        ],
    )
    assert [item.decode() for item in result.as_numpy("text")] == [t.upper() for t in text]
    assert result.as_numpy("blob").tolist() == [b[::-1] for b in blob]
    np.testing.assert_array_equal(result.as_numpy("half"), half * 2)
    np.testing.assert_array_equal(result.as_numpy("flag"), ~flag)


def test_bfloat16_is_taken_for_float32(client):
    result = client.infer(
        "add",
        [tensor("a", A.astype(ml_dtypes.bfloat16), "BF16"), tensor("b", B, "FP32")],
        outputs=[output("sum")],
    )
    np.testing.assert_array_equal(result.as_numpy("sum"), A + B)


@pytest.mark.parametrize("sent", [None, "gzip", "deflate"])
@pytest.mark.parametrize("wanted", [None, "gzip", "deflate"])
def test_bodies_are_compressed_both_ways(client, sent, wanted):
    wide = np.ones((1, 1000), np.float32)
    result = client.infer(
        "add",
        [tensor("a", wide, "FP32"), tensor("b", wide, "FP32")],
        request_compression_algorithm=sent,
        response_compression_algorithm=wanted,
    )
    np.testing.assert_array_equal(result.as_numpy("sum"), wide + wide)


def test_a_version_can_be_named(client):
    assert client.infer("add", addends(), model_version="1").get_response()["model_version"] == "1"


def test_priority_timeout_and_parameters_of_one_s_own_are_taken(client):
    result = client.infer("add", addends(), priority=1, timeout=30_000_000, parameters={"who": "a"})
    np.testing.assert_array_equal(result.as_numpy("sum"), A + B)


def test_what_could_not_start_in_time_is_refused(client):
    with pytest.raises(InferenceServerException) as raised:
        client.infer("add", addends(), timeout=1)
    assert raised.value.status() in ("504", "429")


def test_the_best_classes_are_answered_in_place_of_scores(client):
    scores = np.array([[0.1, 0.7, 0.2], [3, 1, 2]], np.float32)
    result = client.infer(
        "classes", [tensor("scores", scores, "FP32")], outputs=[output("scores", class_count=2)]
    )
    assert result.as_numpy("scores").tolist() == [
        [b"0.700000:1:dog", b"0.200000:2:fish"],
        [b"3.000000:0:cat", b"2.000000:2:fish"],
    ]


@pytest.mark.parametrize(
    ("model", "version", "inputs", "status", "text"),
    [
        ("nobody", "", addends(), "404", "model not found or not loaded: 'nobody'"),
        ("add", "7", addends(), "404", "has no version 7"),
        ("add", "x", addends(), "404", "no version 'x'"),
        ("add", "", addends()[:1], "400", "Missing required input(s): b. Expected inputs: a, b"),
        (
            "add",
            "",
            [tensor("a", A.astype(np.int32), "INT32"), addends()[1]],
            "400",
            "inputs.a: dtype is int32, but the model expects float32",
        ),
        (
            "add",
            "",
            [tensor("a", A[0], "FP32"), addends()[1]],
            "400",
            "inputs.a: expected shape [batch, n], got [3]",
        ),
    ],
)
def test_errors_are_texts_that_say_what_is_wrong(client, model, version, inputs, status, text):
    with pytest.raises(InferenceServerException) as raised:
        client.infer(model, inputs, model_version=version)
    assert raised.value.status() == status
    assert text in raised.value.message()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sequence_id": 5, "sequence_start": True}, "sequences of requests are not supported"),
        ({"outputs": [output("nothing")]}, "Declared outputs: sum, total"),
    ],
)
def test_what_is_not_supported_is_refused(client, options, text):
    with pytest.raises(InferenceServerException, match=text):
        client.infer("add", addends(), **options)


def test_many_at_once_share_passes(client, address):
    before = client.get_inference_statistics("slow")["model_stats"][0]
    lane = f"http://{address}/lanes/slow"
    # However slowly they are sent, none is answered before all are there.
    httpx.post(f"{lane}/pause").raise_for_status()
    asked = [
        client.async_infer("slow", [tensor("x", np.array([[n]], np.float32), "FP32")])
        for n in range(64)
    ]
    with gevent.Timeout(30):
        while httpx.get(lane).json()["waiting"] < 64:
            # The client sends in greenlets.
            gevent.sleep(0.02)
    httpx.post(f"{lane}/resume").raise_for_status()
    answers = [request.get_result().as_numpy("x").item() for request in asked]
    assert answers == list(range(64))
    after = client.get_inference_statistics("slow")["model_stats"][0]
    rows = after["inference_count"] - before["inference_count"]
    passes = after["execution_count"] - before["execution_count"]
    assert rows == 64
    assert passes < 16
    stats = after["inference_stats"]
    assert stats["success"]["count"] - before["inference_stats"]["success"]["count"] == 64
    spent_ns = stats["compute_infer"]["ns"] - before["inference_stats"]["compute_infer"]["ns"]
    assert spent_ns >= passes * 20_000_000
    assert (
        sum(b["compute_infer"]["count"] for b in after["batch_stats"]) == after["execution_count"]
    )


def test_statistics_are_told_of_one_version_or_of_all(client):
    client.infer("add", addends(), model_version="1")
    (first,) = client.get_inference_statistics("add", "1")["model_stats"]
    assert (first["name"], first["version"]) == ("add", "1")
    assert first["inference_count"] >= 1
    assert abs(first["last_inference"] / 1000 - time.time()) < 60
    of_add = client.get_inference_statistics("add")["model_stats"]
    assert [one["version"] for one in of_add] == ["1", "2"]
    everything = client.get_inference_statistics()["model_stats"]
    assert {("add", "2"), ("slow", "1")} <= {(one["name"], one["version"]) for one in everything}
    with pytest.raises(InferenceServerException, match="has no version 7"):
        client.get_inference_statistics("add", "7")


def test_the_index_lists_what_is_loaded_and_what_is_broken(client):
    states = {
        (entry["name"], entry["version"]): entry for entry in client.get_model_repository_index()
    }
    assert states["add", "1"]["state"] == states["add", "2"]["state"] == "READY"
    assert states["broken", ""]["state"] == "UNAVAILABLE"
    assert "signature" in states["broken", ""]["reason"]


def test_models_are_loaded_and_unloaded(client):
    client.unload_model("say")
    assert not client.is_model_ready("say")
    states = {(e["name"], e["version"]): e["state"] for e in client.get_model_repository_index()}
    assert states["say", "1"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="not found or not loaded"):
        client.infer("say", [tensor("text", np.array(["x"], object), "BYTES")])
    client.load_model("say")
    assert client.is_model_ready("say")
    for options in ({"files": {"file:1/model.py": b"x"}}, {"config": "{"}, {"config": '{"a": 1}'}):
        with pytest.raises(InferenceServerException):
            client.load_model("say", **options)
    client.load_model("add", config='{"version_policy": {"specific": {"versions": [1]}}}')
    assert client.infer("add", addends()).get_response()["model_version"] == "1"
    client.load_model("add")
    assert client.infer("add", addends()).get_response()["model_version"] == "2"


def test_shared_memory_is_refused_in_the_protocol_s_words(client):
    with pytest.raises(InferenceServerException, match="shared memory is not supported"):
        client.get_system_shared_memory_status()


# -- What the client does not do, but others may -------------------------------------------------


def post(address: str, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    # Whatever was answered, the connection is at the beginning of the next request.
    connection.request("GET", "/v2/health/live")
    assert json.loads(connection.getresponse().read()) == {"live": True}
    connection.close()
    kind = answer.headers["Content-Type"]
    return answer.status, json.loads(content) if kind == "application/json" else content


INFER = "/v2/models/add/infer"
TEXT = {"name": "a", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}


@pytest.mark.parametrize(
    ("body", "headers", "error"),
    [
        (b"", {}, "expected a JSON object, got an empty body"),
        (b"{", {}, "the body is not valid JSON"),
        (b"{}", {}, "inputs: missing field 'inputs'"),
        (b'{"inputs": []}', {}, "inputs: expected at least one input"),
        (b'{"inputs": []}', {"Inference_Header_Content_Length": "99"}, "expected at most the body"),
        (b'{"inputs": []}', {"Inference_Header_Content_Length": "x"}, "expected at most the body"),
        (b"{}", {"Inference_Header_Content_Length": "9" * 5000}, "expected at most the body"),
        (
            json.dumps({"inputs": [TEXT]}).encode(),
            {},
            "binary_data_size is 4, but 0 bytes are left",
        ),
        (b"not gzip", {"Content_Encoding": "gzip"}, "the body is not valid gzip"),
        (gzip.compress(b"{}", mtime=0)[:-4], {"Content_Encoding": "gzip"}, "it ends too early"),
        (
            gzip.compress(b"{", mtime=0) + gzip.compress(b"}", mtime=0),
            {"Content_Encoding": "gzip"},
            "more bytes follow",
        ),
        (b"x", {"Content_Encoding": "br"}, "expected gzip or deflate"),
    ],
)
def test_a_body_that_is_wrong_is_explained(address, body, headers, error):
    status, answer = post(address, INFER, body, **headers)
    assert status == 400
    assert error in answer["error"]


def test_bytes_that_belong_to_nothing_are_refused(address):
    head = json.dumps({"inputs": [TEXT]}).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    status, answer = post(address, INFER, head + struct.pack("<ff", 1, 2), **length)
    assert (status, answer["error"]) == (400, "4 bytes of binary data belong to no input")


def test_elements_that_are_cut_off_are_refused(address):
    for raw in (b"\x05\0\0\0abc", b"\x05\0"):
        size = {"binary_data_size": len(raw)}
        given = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": size}
        head = json.dumps({"inputs": [given]}).encode()
        length = {"Inference_Header_Content_Length": str(len(head))}
        status, answer = post(address, "/v2/models/say/infer", head + raw, **length)
        assert status == 400
        assert "ends within an element" in answer["error"]


@pytest.mark.parametrize("pack", [None, gzip.compress, zlib.compress])
def test_what_is_too_large_is_refused_and_the_connection_goes_on(address, pack):
    body = b" " * 300_000
    headers = {}
    if pack is not None:
        body = pack(body)
        headers = {"Content_Encoding": "gzip" if pack is gzip.compress else "deflate"}
    status, answer = post(address, INFER, body, **headers)
    assert status == 413
    assert "at most 200000 bytes" in answer["error"]


def test_paths_that_do_not_exist_are_errors_of_the_protocol(address):
    assert post(address, "/v2/nothing", b"{}")[0] == 404
    status, answer = post(address, "/v2/health/ready", b"{}")
    assert status == 405
    assert "error" in answer


def test_a_model_that_writes_texts_generates(address):
    body = json.dumps({"text_input": "hello", "id": "7"}).encode()
    status, answer = post(address, "/v2/models/say/generate", body)
    assert status == 200
    assert answer["text_output"] == "You said hello."
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("say", "1", "7")
    status, event = post(address, "/v2/models/say/versions/1/generate_stream", body)
    assert status == 200
    assert json.loads(event.removeprefix(b"data: "))["text_output"] == "You said hello."
    assert post(address, "/v2/models/add/generate", body)[0] == 400
    options = json.dumps({"text_input": "hello", "parameters": {"temperature": 1}}).encode()
    assert post(address, "/v2/models/say/generate", options)[0] == 400


def test_who_does_not_want_to_wait_gets_the_task(address):
    body = json.dumps({"text_input": "later"}).encode()
    status, answer = post(address, "/v2/models/say/generate", body, Prefer="respond-async")
    assert status == 202
    assert answer["links"]["self"] == f"/tasks/{answer['task_id']}"


def test_a_request_that_is_sent_again_is_done_once(address):
    body = json.dumps({"text_input": "once"}).encode()
    first = post(address, "/v2/models/say/generate", body, Idempotency_Key="k-1")
    assert post(address, "/v2/models/say/generate", body, Idempotency_Key="k-1") == first
