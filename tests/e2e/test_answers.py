"""Many tasks at once, through the whole platform: each is answered as by the model alone."""

from __future__ import annotations

import io
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from inferno.client import Client, Request
from inferno.engine.engine import Engine
from inferno.protocol.limits import Limits
from inferno.repository.repository import Repository
from inferno.settings import Settings
from inferno.testing.processes import ROOT

#: Enough words for a thousand different sentences.
SUBJECTS = (
    "The film,This phone,Our waiter,The hotel,Her lecture,"
    "My bicycle,The update,That soup,The train,His book"
)
VERBS = "was,seemed,became,remained,felt,proved,looked,stayed,turned out,ended up"
ENDS = (
    "rather dull,a real pleasure,not bad at all,worse than I feared,far too expensive,"
    "surprisingly good,nothing special,exactly what we needed,impossible to use,"
    "a joy from beginning to end"
)


def texts() -> list[str]:
    words = (part.split(",") for part in (SUBJECTS, VERBS, ENDS))
    return [" ".join(sentence) + "." for sentence in itertools.product(*words)]


def images(count: int) -> list[bytes]:
    pixels = np.load(ROOT / "models" / "digits" / "heldout.npz")["pixels"][:count]
    encoded = []
    for digit in pixels:
        large = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((64, 64))
        buffer = io.BytesIO()
        large.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def alone(model: str, inputs: list) -> list[dict]:
    """Run a model's engine in this process, on one input at a time."""
    settings = Settings(repository={"root": ROOT / "models"})
    package = Repository.read(settings.repository).model(model).package()
    engine = Engine(package, settings.batching, settings.inference)
    (spec, *_) = package.signature.inputs
    limits = Limits(10**6, 10**7, 10)
    answers = []
    for value in inputs:
        tensor = value
        if spec.dtype == "bytes":
            array = np.empty(1, dtype=object)
            array[0] = value
            arrays = {spec.name: array}
        else:
            arrays = package.signature.parse({spec.name: tensor}, limits)
        answers += engine.forward([engine.prepare(arrays)])
    return answers


def through_platform(url: str, model: str, inputs: list) -> list:
    """Submit all inputs at once over one socket; results in the order of the inputs."""
    requests = [Request(model, value) for value in inputs]
    with Client(url) as client:
        by_request = {id(result.request): result for result in client.stream(requests)}
    return [by_request[id(request)].checked() for request in requests]


def test_concurrent_tasks_get_the_answers_of_the_model_alone(platform):
    inputs: dict[str, list] = {"embed": texts(), "sentiment": texts(), "digits": images(300)}
    assert len(set(inputs["embed"])) == 1000
    with ThreadPoolExecutor(len(inputs)) as pool:
        running = {m: pool.submit(through_platform, platform.url, m, inputs[m]) for m in inputs}
        results = {model: future.result() for model, future in running.items()}

    ids = {result.task_id for model in results for result in results[model]}
    assert len(ids) == 2300
    for model in ("embed", "sentiment"):
        # How full the mean batch is depends on the machine; that full ones form does not.
        assert max(result.raw["batch"]["size"] for result in results[model]) == 32
    expected = {model: alone(model, values) for model, values in inputs.items()}
    for result, answer in zip(results["embed"], expected["embed"], strict=True):
        assert float(result.outputs["embedding"][0] @ answer["embedding"][0]) > 0.9999
    for model in ("sentiment", "digits"):
        for result, answer in zip(results[model], expected[model], strict=True):
            assert result.outputs["label"].tolist() == answer["label"].tolist()
            np.testing.assert_allclose(result.outputs["scores"], answer["scores"], atol=1e-4)


def test_an_ensemble_answers_as_its_models_do(platform):
    with Client(platform.url) as client:
        given = client.predict("insight", ["A joy.", "A bore."])
        embedding = client.predict("embed", ["A joy.", "A bore."]).outputs["embedding"]
    np.testing.assert_allclose(given.outputs["embedding"], embedding, atol=1e-5)
    assert given.outputs["label"].tolist() == ["positive", "negative"]
    assert {stage["name"] for stage in given.raw["stages"]} == {"embed", "sentiment"}


def test_one_poisonous_member_of_32_fails_alone(platform):
    texts = [f"text {n}" for n in range(32)]
    texts[17] = "poison!"
    with Client(platform.url) as client:
        # Keeps the only executor busy until all 32 wait.
        client.submit("mock", "sleep:1500")
        requests = [Request("mock", text) for text in texts]
        results = {
            result.request.inputs: result for result in client.stream(requests) if result.request
        }
    failed = [text for text, result in results.items() if result.error is not None]
    assert failed == ["poison!"]
    assert len(results) == 32
    assert {
        r.outputs["text"].tolist()[0] for text, r in results.items() if text != "poison!"
    } == set(texts) - {"poison!"}
