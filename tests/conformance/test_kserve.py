"""KServe's own client, for both of its protocols."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

Call = Callable[[str, Callable[[Any, str], Awaitable[Any]]], Any]


@pytest.fixture
def call(address: str, kserve_client: Any) -> Call:
    """Return a function that calls something of a client of one protocol, given the address."""

    def call(protocol: str, method: Callable[[Any, str], Awaitable[Any]]) -> Any:
        config = kserve_client.RESTConfig(protocol=protocol)
        client = kserve_client.InferenceRESTClient(config)

        async def run() -> Any:
            try:
                return await method(client, f"http://{address}")
            finally:
                await client.close()

        return asyncio.run(run())

    return call


def test_v1_answers_instances_with_predictions(call: Call) -> None:
    def predict(model: str, *instances: Any) -> Any:
        body = {"instances": list(instances)}
        answer = call("v1", lambda c, url: c.infer(url, model_name=model, data=body))
        return answer["predictions"]

    assert predict("classes", [1, 2, 3], [4, 5, 6]) == [[1, 2, 3], [4, 5, 6]]
    assert predict("say", "hello") == ["You said hello."]
    assert predict("say", {"text": "hello"}, {"text": "you"}) == [
        "You said hello.",
        "You said you.",
    ]
    assert predict("add", {"a": [1, 2], "b": [3, 4]}) == [{"sum": [4, 6], "total": 10}]
    picture = {"text": "x", "blob": {"b64": "YWJj"}, "half": [1, 2], "flag": True}
    assert predict("types", picture) == [
        {"text": "X", "blob": "Y2Jh", "half": [2, 4], "flag": False}
    ]


def test_v1_says_what_is_ready(call: Call) -> None:
    assert call("v1", lambda c, url: c.is_model_ready(url, "add"))


def test_v2_infers_in_json_and_in_binary(call: Call, kserve_client: Any) -> None:
    protocol = sys.modules["kserve.protocol.infer_type"]

    async def infer(request: Any, client: Any, url: str) -> Any:
        return await client.infer(url, request, model_name="add")

    a, b = np.array([[1, 2]], np.float32), np.array([[3, 4]], np.float32)
    for binary in (False, True):
        inputs = []
        for name, array in (("a", a), ("b", b)):
            given = protocol.InferInput(name, list(array.shape), "FP32")
            given.set_data_from_numpy(array, binary_data=binary)
            inputs.append(given)
        request = protocol.InferRequest("add", inputs, request_id="r-2")
        answer = call("v2", partial(infer, request))
        np.testing.assert_array_equal(answer.outputs[0].as_numpy(), a + b)
        assert (answer.id, answer.model_name) == ("r-2", "add")


def test_v2_says_what_is_live_and_ready(call: Call) -> None:
    assert call("v2", lambda c, url: c.is_server_live(url))
    assert call("v2", lambda c, url: c.is_server_ready(url))
    assert call("v2", lambda c, url: c.is_model_ready(url, "add"))
